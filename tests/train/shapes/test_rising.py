"""Schedules of masks, temporal losses and windows: where they begin, end and turn."""

from __future__ import annotations

import pytest

from saemill.train.engine.adam import Optim
from saemill.train.engine.schedules import Complement, Doubling, HalfLife, Onset, Ramp, SigmoidRamp
from saemill.train.errors import ConfigInvalid
from saemill.train.kit.variant_registry import config_type

TOTAL = 1000


def test_a_sigmoid_ramp_is_exactly_zero_and_one_at_its_ends_and_never_falls():
    ramp = SigmoidRamp(0.1, 0.6)
    values = [ramp(step, TOTAL) for step in range(TOTAL + 1)]
    assert values[:101] == [0.0] * 101 and values[600:] == [1.0] * 401
    assert values[350] == pytest.approx(0.5) and values == sorted(values)


def test_windows_double_in_equal_parts_up_to_the_whole():
    doubling = Doubling(16, 128)
    assert [doubling(step, TOTAL) for step in (0, 249, 250, 499, 500, 750, 999, 1000)] == [
        *(16, 16, 32, 32, 64, 128, 128, 128)
    ]
    assert Doubling(16, 100)(TOTAL, TOTAL) == 100 and Doubling(64, 32)(0, TOTAL) == 32


def test_an_onset_is_idle_then_rises_and_short_runs_have_short_ones():
    onset = Onset(100, 100)
    values = [onset(step, TOTAL) for step in (0, 99, 100, 149, 200, TOTAL)]
    assert values[:2] == [0.0, 0.0] and values[2] > 0 and values[3] == pytest.approx(0.495, abs=0.01)
    assert values[4:] == [1.0, 1.0]
    assert Onset(5000, 5000)(200, TOTAL) == 1.0


def test_a_complement_is_high_until_the_other_is_there():
    assert [Complement(Ramp(0.0, 1.0, 0.5, 0.5), 1.0)(step, 4) for step in (0, 4)] == [2.0, 1.0]


@pytest.mark.parametrize("onset", [Onset(50, 150, 0.2), Onset(5000, 5000, 0.1)])
def test_a_half_life_halves_from_the_end_of_an_onset_on(onset):
    assert onset.end(TOTAL) == 200 and onset(199, TOTAL) < 1.0 == onset(200, TOTAL)
    assert [HalfLife(onset, 0.4)(step, TOTAL) for step in (0, 200, 600, 1000)] == [1.0, 1.0, 0.5, 0.25]
    assert HalfLife(onset, 0.4)(201, TOTAL) < 1.0


def test_temporal_weights_fall_as_soon_as_they_are_there():
    """However long the run would let the onset be."""
    config = config_type("temporal")(width=16, half_life_fraction=0.1, idle_max_fraction=0.5, context=32)
    weight = config.build(8).terms[-1].weight
    there = [weight(step, 10_000) for step in (999, 1000, 1001, 2000)]
    assert there[0] < there[1] > there[2] and there[3] == pytest.approx(there[1] / 2)


def test_a_cubic_warm_up_begins_slower_and_ends_at_the_same_rate():
    line, cube = (Optim(lr=1.0, warmup_steps=50, warmup_power=power).schedule() for power in (1.0, 3.0))
    assert cube(9, TOTAL) == pytest.approx(line(9, TOTAL) ** 3) and cube(50, TOTAL) == line(50, TOTAL) == 1.0
    with pytest.raises(ConfigInvalid, match="warmup_power"):
        Optim(warmup_power=0.0)
