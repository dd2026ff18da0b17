"""Paired differences, their intervals, and the correction for many comparisons, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from saemill.studies.compare_and_decide import Difference, compare, corrected


def table(**labels):
    """Values of one measure by label and seed."""
    return {label: {seed: {"ev": value} for seed, value in enumerate(values)} for label, values in labels.items()}


def test_a_difference_is_that_of_a_paired_t_test():
    one, two = [0.80, 0.83, 0.79, 0.85, 0.81], [0.78, 0.80, 0.78, 0.82, 0.80]
    (found,) = compare(table(one=one, base=two), ["base"], ["ev"])
    expected = stats.ttest_rel(one, two)
    interval = expected.confidence_interval(0.95)
    assert (found.label, found.against, found.seeds) == ("one", "base", 5)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(tuple(interval))
    assert found.verdict == "more" and compare(table(one=two, base=one), ["base"], ["ev"])[0].verdict == "less"


def test_seeds_that_one_side_lacks_do_not_count_and_one_pair_is_no_comparison():
    values = table(one=[0.8, 0.9, 0.7], base=[0.7, 0.85])
    assert compare(values, ["base"], ["ev"])[0].seeds == 2
    assert compare(table(one=[0.8], base=[0.7]), ["base"], ["ev"]) == []
    assert compare(table(one=[0.8, None], base=[0.7, 0.6]), ["base"], ["ev"]) == []


def test_two_controls_are_compared_once():
    found = compare(table(base=[1, 2.0], control=[2, 4.0], one=[3, 5.0]), ["base", "control"], ["ev"])
    assert [(d.label, d.against) for d in found] == [("control", "base"), ("one", "base"), ("one", "control")]


@pytest.mark.parametrize(
    ("value", "p"), [(0.3, 1.0), (0.5, 2.0**-4), (0.1 + 0.2, 2.0**-4), (1152 / 1151 - 0.7, 2.0**-4)]
)
def test_differences_without_spread(value, p):
    """One latent more in each of five seeds is no proof, and rounding is none: their signs are all there is."""
    (found,) = compare(table(one=[value] * 5, base=[0.3] * 5), ["base"], ["ev"])
    assert (found.p, found.verdict) == (p, "no difference shown")


def test_holm_by_hand():
    found = corrected([Difference("a", "b", "m", 5, 1.0, 0.1, p) for p in (0.04, 0.01, 0.03)])
    assert [d.p_corrected for d in found] == pytest.approx([0.06, 0.03, 0.06])
    assert [d.verdict for d in found] == ["no difference shown", "more", "no difference shown"]


def test_pure_noise_is_seldom_called_a_difference():
    """Of 200 runs of 20 comparisons between SAEs that are alike, about one in twenty may show any."""
    rng, false = np.random.default_rng(0), 0
    for _ in range(200):
        draws = {f"sae_{i}": rng.normal(size=5) for i in range(20)} | {"base": np.zeros(5)}
        false += any(d.verdict != "no difference shown" for d in compare(table(**draws), ["base"], ["ev"]))
    assert false <= 20
