"""Is a completion the expected attribute? SAEBench's rules on strings.

The first rule that fits the text and the label applies; if none does, the shorter of label and answer must begin the
longer.

As in SAEBench, offsets from UTC are those of today, so an answer may be right in summer and wrong in winter; where
daylight saving is the usual reason, one hour of difference is tolerated.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError


@dataclass(frozen=True)
class Answer:
    """The question, the expected attribute, and the model's completion; the `lower` forms are normalised."""

    text: str
    label: str
    completion: str

    @property
    def lower_label(self) -> str:
        return self.label.lower()

    @property
    def lower(self) -> str:
        """The completion up to a quotation mark, without spaces around it."""
        return self.completion.split('"')[0].strip(' "').replace("\\/", "/").lower()


def is_right(text: str, label: str, completion: str) -> bool:
    """Whether `completion` continues `text` with the attribute `label`."""
    answer = Answer(text, label, completion)
    if not label or not answer.lower:
        return False
    rule = next((judge for applies, judge in RULES if applies(answer)), _one_begins_the_other)
    return rule(answer)


def _one_begins_the_other(answer: Answer) -> bool:
    shorter, longer = sorted((answer.lower, answer.lower_label), key=len)
    return longer.startswith(shorter)


def _near(answer: Answer) -> bool:
    """Coordinates: within two degrees, whatever the sign; an answer without a number is wrong."""
    found = re.search(r"\d+", answer.lower)
    try:
        expected = float(answer.lower_label.strip("-\N{MINUS SIGN}"))
    except ValueError:
        return False
    return found is not None and abs(expected - float(found[0])) <= 2


def _names_the_union(answer: Answer) -> bool:
    """United States or Kingdom, spelled exactly, with or without "the"; England passes for either."""
    given, expected = (name.strip().replace("the ", "") for name in (answer.completion, answer.label))
    return given.startswith((expected, "England"))


Applies = Callable[[Answer], bool]
RULES: tuple[tuple[Applies, Applies], ...] = (
    (lambda answer: any(word in answer.text for word in ("coord", "latitude", "longitude")), _near),
    (lambda answer: "United States" in answer.label or "United Kingdom" in answer.label, _names_the_union),
    (lambda answer: "South Korea" in answer.label, lambda answer: answer.lower.startswith(("korea", "south korea"))),
    (
        lambda answer: "North America" in answer.label,
        lambda answer: answer.lower_label in answer.lower or answer.lower == "na" or answer.lower.startswith("america"),
    ),
    (
        lambda answer: "Mandarin" in answer.label,
        lambda answer: answer.lower in answer.lower_label or answer.lower == "chinese",
    ),
    (
        lambda answer: "language" in answer.text and "," in answer.label,
        lambda answer: any(language in answer.lower for language in answer.lower_label.split(",")),
    ),
    (
        lambda answer: "UTC" in answer.text and "/" in answer.label,
        lambda answer: is_offset_of(answer.label, answer.lower),
    ),
)


def is_offset_of(zone: str, answer: str, when: datetime | None = None) -> bool:
    """Whether an answer such as "-05:00" is the offset of a zone such as "America/New_York"."""
    expected = offset_of(zone, when or datetime.now())
    if expected is None:
        return False
    hours = expected.split(":")[0]
    if answer.startswith(hours) or (re.search(r"[+\-]0\d", answer) and answer.replace("0", "", 1).startswith(hours)):
        return True
    return (_has_summer_time(zone, expected) and _within_an_hour(expected, answer)) or _wraps_to(expected, answer)


def offset_of(zone: str, when: datetime) -> str | None:
    """A zone's offset, such as "+5:30"; None for a name that is not a zone."""
    try:
        offset = ZoneInfo(zone).utcoffset(when)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None
    seconds = 0 if offset is None else offset.seconds
    sign = "+" if seconds < 12 * 3600 else "-"
    seconds = seconds if sign == "+" else 24 * 3600 - seconds
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    shown_hours = "" if hours == 0 and seconds >= 1800 else str(hours)
    return f"{sign}{shown_hours}:{minutes:02d}"


def _has_summer_time(zone: str, expected: str) -> bool:
    if zone.startswith("America"):
        return re.search(r"-[5-8]", expected) is not None
    return zone.startswith(("Europe", "Africa")) and re.search(r"\+[0-3]", expected) is not None


def _within_an_hour(expected: str, answer: str) -> bool:
    found = [re.search(r"[+\-]?(\d\d?):\d+", text) for text in (expected, answer)]
    hours = [int(match[1]) for match in found if match is not None]
    return len(hours) == 2 and abs(hours[0] - hours[1]) <= 1


def _wraps_to(expected: str, answer: str) -> bool:
    """An offset of more than eleven hours, counted the other way round."""
    found = re.search(r"[+\-](\d+)", answer)
    return found is not None and int(found[1]) > 11 and str(24 - int(found[1])) in expected
