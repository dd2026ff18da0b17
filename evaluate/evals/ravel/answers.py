"""Is a completion the expected attribute? SAEBench's rules on strings.

Text and label say which rule applies, the first that fits; without one, the shorter of label and answer must
begin the longer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .timezones import is_offset_of

COORDINATES = ("coord", "latitude", "longitude")
TOLERANCE_DEGREES = 2


@dataclass(frozen=True)
class Answer:
    """What was asked, what was expected, and what came; `lower_` forms are normalised."""

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
    return found is not None and abs(expected - float(found[0])) <= TOLERANCE_DEGREES


def _names_the_union(answer: Answer) -> bool:
    """United States or Kingdom, as they are written, with or without "the"; England will do for either."""
    given, expected = (name.strip().replace("the ", "") for name in (answer.completion, answer.label))
    return given.startswith((expected, "England"))


def _names_korea(answer: Answer) -> bool:
    return answer.lower.startswith(("korea", "south korea"))


def _names_north_america(answer: Answer) -> bool:
    return answer.lower_label in answer.lower or answer.lower == "na" or answer.lower.startswith("america")


def _names_mandarin(answer: Answer) -> bool:
    return answer.lower in answer.lower_label or answer.lower == "chinese"


def _names_one_of_the_languages(answer: Answer) -> bool:
    return any(language in answer.lower for language in answer.lower_label.split(","))


def _names_the_offset(answer: Answer) -> bool:
    return is_offset_of(answer.label, answer.lower)


Applies = Callable[[Answer], bool]
RULES: tuple[tuple[Applies, Applies], ...] = (
    (lambda answer: any(word in answer.text for word in COORDINATES), _near),
    (lambda answer: "United States" in answer.label or "United Kingdom" in answer.label, _names_the_union),
    (lambda answer: "South Korea" in answer.label, _names_korea),
    (lambda answer: "North America" in answer.label, _names_north_america),
    (lambda answer: "Mandarin" in answer.label, _names_mandarin),
    (lambda answer: "language" in answer.text and "," in answer.label, _names_one_of_the_languages),
    (lambda answer: "UTC" in answer.text and "/" in answer.label, _names_the_offset),
)
