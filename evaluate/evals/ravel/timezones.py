"""Answers that give a time zone as an offset from UTC.

Offsets are those of today, as SAEBench takes them, so an answer may be right in summer and wrong in winter;
one hour of tolerance is given where daylight saving is the usual reason.
"""

from __future__ import annotations

import re
from datetime import datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

HALF_DAY_SECONDS = 12 * 3600
DAY_HOURS = 24


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
    """As "+5:30"; None for a name that is not a zone."""
    try:
        offset = ZoneInfo(zone).utcoffset(when)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None
    seconds = 0 if offset is None else offset.seconds
    sign = "+" if seconds < HALF_DAY_SECONDS else "-"
    seconds = seconds if sign == "+" else DAY_HOURS * 3600 - seconds
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
    return found is not None and int(found[1]) > 11 and str(DAY_HOURS - int(found[1])) in expected
