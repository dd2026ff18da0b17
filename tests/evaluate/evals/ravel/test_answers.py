"""Which completions count as the attribute: the official package's verdicts, and zones by hand."""

from __future__ import annotations

import itertools
import json
from datetime import datetime
from pathlib import Path

import pytest

from saemill.evaluate.evals.ravel.answers import is_offset_of, is_right, offset_of

GOLDEN = Path(__file__).parents[3] / "golden" / "ravel_answers.json"
SUMMER, WINTER = datetime(2026, 7, 1), datetime(2026, 1, 1)


def test_every_verdict_is_that_of_the_official_package():
    golden = json.loads(GOLDEN.read_text())
    cases = list(itertools.product(golden["texts"], golden["labels"], golden["completions"]))
    assert golden["right"].count("1") > 50  # a golden that says no to everything would prove little
    assert "".join(str(int(is_right(*case))) for case in cases) == golden["right"]


@pytest.mark.parametrize(
    ("zone", "when", "offset"),
    [
        ("America/New_York", WINTER, "-5:00"),
        ("America/New_York", SUMMER, "-4:00"),
        ("Asia/Kolkata", SUMMER, "+5:30"),
        ("Etc/UTC", SUMMER, "+0:00"),
        ("no/zone", SUMMER, None),
    ],
)
def test_offsets(zone, when, offset):
    assert offset_of(zone, when) == offset


@pytest.mark.parametrize(
    ("answer", "right"),
    [("-05:00", True), ("-5", True), ("-04:00", True), ("-06:00", True), ("-07:00", False), ("+05:00", True)],
)
def test_an_hour_of_daylight_saving_is_forgiven_and_then_the_sign_is_too(answer, right):
    assert is_offset_of("America/New_York", answer, WINTER) is right


def test_offsets_over_eleven_hours_are_counted_the_other_way_round():
    assert is_offset_of("America/New_York", "+19:00", WINTER)
    assert not is_offset_of("America/New_York", "+20:00", WINTER)
