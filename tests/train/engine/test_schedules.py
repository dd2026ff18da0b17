"""Schedules at their ends, in their middles, and as pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saemill.train.engine.schedules import (
    Complement,
    Constant,
    Decay,
    ExponentialApproach,
    Next,
    Onset,
    Product,
    Ramp,
    cut_short,
)


def test_constant():
    assert [Constant(2.5)(step, 10) for step in (0, 9)] == [2.5, 2.5]


def test_ramp_is_flat_outside_its_fractions_and_straight_inside():
    ramp = Ramp(1.0, 3.0, begin_fraction=0.25, end_fraction=0.75)
    assert [ramp(step, 100) for step in (0, 25, 50, 75, 99)] == [1.0, 1.0, 2.0, 3.0, 3.0]


def test_ramp_without_length_has_its_end_from_where_it_begins():
    assert Ramp(0.0, 1.0, end_fraction=0.0)(0, 100) == 1.0
    assert [Ramp(1.0, 0.25, 0.5, 0.5)(step, 100) for step in (49, 50)] == [1.0, 0.25]
    assert [Ramp(1.0, 0.2, begin_fraction=1.0)(step, 100) for step in (0, 99)] == [1.0, 1.0]


def test_warm_up_never_is_zero_and_ends_at_its_value():
    warm = Onset(0, 9, max_fraction=1.0)
    assert [warm(step, 100) for step in (0, 4, 9, 50)] == [0.1, 0.5, 1.0, 1.0]
    assert [Onset(0, 9, 1.0, power=3.0)(step, 100) for step in (0, 4, 9)] == [0.1**3, 0.5**3, 1.0]


def test_warm_up_takes_no_more_than_its_fraction_of_a_short_run():
    assert Onset(0, 1000, max_fraction=0.1)(10, 100) == 1.0


def test_decay_falls_over_the_last_fraction():
    decay = Decay(0.2)
    assert [round(decay(step, 100), 9) for step in (0, 80, 90, 100)] == [1.0, 1.0, 0.5, 0.0]
    assert Decay(0.0)(99, 100) == 1.0
    assert Decay(1.0)(50, 100) == 0.5


def test_the_seeds_temperature_goes_from_one_and_a_half_to_a_half():
    tau = ExponentialApproach(1.5, 0.5, steps=1000)
    assert tau(0, 1) == 1.5
    assert tau(1000, 1) == pytest.approx(0.5 + 0.36787944)
    assert tau(10**6, 1) == pytest.approx(0.5)


def test_product_and_next():
    ramp = Ramp(0.0, 1.0)
    assert Product((Constant(2.0), ramp))(50, 100) == pytest.approx(1.0)
    assert Next(ramp)(4, 10) == ramp(5, 10)


@given(
    step=st.integers(0, 1000),
    total=st.integers(1, 1000),
    start=st.floats(-5, 5),
    end=st.floats(-5, 5),
    fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_a_ramp_stays_between_its_ends(step, total, start, end, fractions):
    value = Ramp(start, end, *fractions)(step, total)
    assert min(start, end) - 1e-9 <= value <= max(start, end) + 1e-9


def test_what_a_short_run_cuts_is_known():
    onset = Onset(500, 100, max_fraction=0.2)
    both = Product((Onset(0, 1000), Complement(onset, 1.0), Decay(0.2)))
    assert cut_short(both, 534) == [(1000, 53), (500, 106)]
    assert cut_short(both, 10_000) == []
    assert cut_short(Next(Onset(0, 10)), 50) == [(10, 5)]
