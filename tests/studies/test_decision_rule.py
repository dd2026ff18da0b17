"""The rule of docs/studies/questions.md, case by case, and the pictures of a run of several seeds."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from saemill.evaluate.output.figures.style import look
from saemill.evaluate.output.plots import save
from saemill.studies.compare_and_decide import compare, judge, own_controls
from saemill.studies.seed_plots import draw_bands, draw_measures, draw_training, smoothed

NOISE = (-0.02, 0.01, 0.0, 0.03, -0.01)
AGAINST = ("base", "control")


def family(gain=0.0, other=0.0, grew=0.001, wobble=0.02):
    """Five seeds of one SAE: at one measure and another so much more than the base, less a little noise."""
    return {
        seed: {
            "ev": 0.7 + n + gain + wobble * n * (-1) ** seed,
            "ce": 0.9 + n + other * (1 + seed / 50),
            "growth": grew,
        }
        for seed, n in enumerate(NOISE)
    }


def found(values):
    (finding,) = judge(values, AGAINST, compare(values, AGAINST, ["ev", "ce"]), ["ev", "ce"])
    return finding


def test_better_than_base_and_control_and_worse_at_nothing_helps():
    finding = found({"base": family(wobble=0), "control": family(wobble=0), "method": family(gain=0.1)})
    assert finding.verdict == "helps" and "ev" in finding.why and "ce" not in finding.why


@pytest.mark.parametrize(("l0", "verdict"), [(33.0, "helps"), (36.0, "undecided")])
def test_a_gain_with_more_active_latents_is_undecided(l0, verdict):
    sizes = {"base": 32.0, "control": 32.0, "method": l0}
    values = {"base": family(wobble=0), "control": family(wobble=0), "method": family(gain=0.1)}
    finding = found({label: {at: one | {"l0": sizes[label]} for at, one in of.items()} for label, of in values.items()})
    assert finding.verdict == verdict
    assert ("not at equal sparsity, L0 36.0 against 32.0" in finding.why) == (verdict == "undecided")


@pytest.mark.parametrize(
    "values",
    [
        {"base": family(wobble=0), "control": family(gain=0.1, wobble=0), "method": family(gain=0.1)},
        {"base": family(wobble=0), "control": family(wobble=0), "method": family(gain=0.1, other=-0.1)},
    ],
    ids=["no better than the control", "worse elsewhere"],
)
def test_a_gain_that_the_control_has_or_that_is_paid_for_elsewhere_is_undecided(values):
    assert found(values).verdict == "undecided"


def test_who_is_worse_than_a_control_elsewhere_does_not_help():
    """The sentence names the base and every control, and then asks for no less at the others."""
    values = {"base": family(wobble=0), "control": family(other=0.1, wobble=0), "method": family(gain=0.1)}
    finding = found(values)
    assert finding.verdict == "undecided" and "worse than control at ce" in finding.why
    assert "better than base and control at ev" in finding.why and "worse than base" not in finding.why


def test_no_room_for_a_gain_of_one_deviation_does_not_help():
    values = {"base": family(wobble=0), "control": family(wobble=0), "method": family(gain=-0.01)}
    assert found(values).verdict == "does not help"
    wide = {"base": family(wobble=0), "control": family(wobble=0), "method": family(gain=0.02, wobble=2.0)}
    assert found(wide).verdict == "undecided"


def test_nothing_is_read_from_a_run_whose_base_still_grows():
    values = {"base": family(grew=0.0101, wobble=0), "control": family(), "method": family(gain=0.1, grew=0.0)}
    finding = found(values)
    assert finding.verdict == "not decided: budget too small" and "0.0101" in finding.why
    unlogged = {label: {s: {"ev": one["ev"]} for s, one in seeds.items()} for label, seeds in values.items()}
    assert "no run of it at half the length" in found(unlogged).why


def test_a_measure_at_which_a_sanity_baseline_does_as_well_is_not_used():
    values = {"base": family(wobble=0), "control": family(wobble=0), "method": family(gain=0.1)}
    assert found(values).verdict == "helps"
    finding = found(values | {"base_frozen_decoder": family(gain=-0.01, other=-0.5)})
    assert finding.verdict != "helps" and finding.why.endswith("does as well: ev")
    assert found(values | {"pca_k32_layer15": family(gain=-0.1, other=-0.5)}).verdict == "helps"


GAINED = {"base": family(wobble=0), "control": family(wobble=0), "method": family(gain=0.1)}


def without(values, label, measure, seeds: Sequence[int] = range(5)):
    """The same, but of these seeds of an SAE the measure gave no number."""
    return values | {label: {s: one | ({measure: None} if s in seeds else {}) for s, one in values[label].items()}}


def test_what_lacks_a_measure_is_undecided():
    """It could be worse there, or gain there: neither verdict stands without it."""
    assert found(GAINED).verdict == "helps"
    lost = {"base": family(wobble=0), "control": family(wobble=0), "method": family(gain=-0.01)}
    for values in (GAINED, lost):
        for label in values:
            finding = found(without(values, label, "ce"))
            assert finding.verdict == "undecided" and finding.why.startswith("not measured: ce; ")
    (finding,) = judge(GAINED, AGAINST, compare(GAINED, AGAINST, ["ev", "ce"]), ["ev", "ce", "tpp"])
    assert finding.verdict == "undecided" and "not measured: tpp" in finding.why
    assert "better than base and control at ev" in finding.why


def test_what_a_sanity_baseline_does_as_well_at_may_be_missing():
    values = without(GAINED, "method", "ce") | {"pca_k32_layer15": family(gain=-0.5, other=0.5)}
    assert found(values).verdict == "helps"


def test_a_seed_that_gave_no_number_is_told():
    assert "fewer than" not in found(GAINED).why
    finding = found(without(GAINED, "method", "ce", seeds=[3]))
    assert finding.verdict == "helps" and "of fewer than 5 seeds: ce" in finding.why


def test_a_budget_counts_if_every_seed_of_the_base_is_known_to_have_converged():
    finding = found(without(GAINED, "base", "growth", seeds=[4]))
    assert finding.verdict == "not decided: budget too small" and "known of 4 of its 5 seeds" in finding.why


def test_a_gain_over_a_base_whose_seeds_are_all_alike_is_not_said_to_be_none():
    """All of its latents alive in every seed, or half of them: the deviation is nothing."""

    def alive(share):
        lost = {"base": family(wobble=0), "control": family(wobble=0), "method": family(gain=-0.01)}
        shares = {"base": 0.5, "control": share, "method": share}
        return {label: {s: one | {"ce": shares[label]} for s, one in lost[label].items()} for label in lost}

    assert found(alive(0.5)).verdict == "does not help"
    finding = found(alive(0.9))
    assert finding.verdict == "undecided" and "a gain is not excluded at ce" in finding.why


def test_without_a_sanity_baseline_it_is_said_that_there_was_none():
    assert found(GAINED).why.endswith("; there is no sanity baseline")
    baseline = family(gain=-0.3, other=-0.3)
    assert "baseline" not in found(GAINED | {"pca_k32_layer15": baseline}).why
    finding = found(without(GAINED | {"pca_k32_layer15": baseline}, "pca_k32_layer15", "ce"))
    assert finding.why.endswith("; no sanity baseline has a number at ce")


def test_a_control_that_breaks_another_method_is_not_asked():
    controls = ("hard_scattered", "encoders_scattered")
    assert own_controls("hard", ("hard", "encoders"), controls) == ["hard_scattered"]
    assert own_controls("guided", ("guided", "guided_strongly"), ("shuffled", "nearest")) == ["shuffled", "nearest"]


def test_pictures_have_every_seed_and_both_kinds(tmp_path):
    values = {"base": family(), "$x^<b>": family(gain=0.1)}
    curves = {label: [[(step, 0.1 * step) for step in range(9)] for _ in NOISE] for label in values}
    written = draw_bands("decisive", "a study", values, "base", curves, tmp_path)
    assert sorted(path.name for path in written) == [
        f"decisive_{name}.{kind}" for name in ("measures", "training") for kind in ("png", "svg")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    assert (tmp_path / "decisive_measures.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "decisive_measures.svg").read_text()
    assert "<svg" in text and "<b>" not in text
    left = draw_bands("decisive", "a study", values, "base", {}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in left} and len(left) == 2


def test_a_sanity_baseline_far_off_leaves_the_axis_to_what_is_compared():
    """A frozen decoder at 0.25 made one tick of 0.809 against 0.797."""
    means = {"base": 0.809, "guided": 0.797, "base_frozen_decoder": 0.25, "pca_k32_layer15": 0.9}
    values = {label: {0: {"explained_variance": mean}} for label, mean in means.items()}
    values["base"][0] |= {"growth": 0.01, "steps": 44}  # of the base alone: nothing to compare
    figure = draw_measures("a study", values, "base", {label: look(0) for label in values}, ["explained_variance"])
    assert figure is not None
    (axis,) = figure.axes
    low, high = axis.get_xlim()
    assert 0.79 < low < 0.797 and 0.809 < high < 0.82
    arrows = ["\N{LEFTWARDS ARROW} 0.25", "0.9 \N{RIGHTWARDS ARROW}"]
    assert [text.get_text() for text in axis.texts] == arrows and len(axis.lines) == 2
    assert axis.get_title() == "explained variance" and axis.get_xlabel().endswith("more is better")


@pytest.mark.parametrize("others", [("guided", "pca_k32_layer15"), ("base_frozen_decoder", "pca_k32_layer15")])
def test_an_axis_fits_its_values_where_nothing_compared_differs(others):
    """It was 0 to 1, and numbers of 40 were arrows at its right edge."""
    values = {label: {0: {"score": score}} for label, score in zip(others, (40.0, 44.0), strict=True)}
    values = {"base": values.get("guided", {0: {}}), **values}
    figure = draw_measures("a study", values, "base", {label: look(0) for label in values})
    assert figure is not None
    (axis,) = figure.axes
    low, high = axis.get_xlim()
    assert 36 < low < 40 < high < 48
    assert [text.get_text() for text in axis.texts] == (["44 \N{RIGHTWARDS ARROW}"] if "guided" in others else [])


def test_panels_of_one_metric_of_two_groups_are_told_apart():
    """Both were titled "mean"."""
    names = ("contrast: near.mean", "contrast: far.mean", "steps_of_it")
    values = {label: {0: dict.fromkeys(names, value)} for label, value in (("base", 1.0), ("guided", 2.0))}
    figure = draw_measures("a study", values, "base", {label: look(0) for label in values})
    titles = ["contrast: near mean", "contrast: far mean", "steps of it"]
    assert figure is not None and [axis.get_title() for axis in figure.axes] == titles


def test_the_legend_of_curves_lies_beside_them(tmp_path):
    curves = {label: [[(step, 0.1 * step) for step in range(9)]] for label in ("base", "guided")}
    figure = draw_training("a study", curves, {label: look(0) for label in curves})
    assert figure is not None
    save(figure, tmp_path / "training.png")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["base", "guided"]
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_window_extent())


@pytest.mark.parametrize("lengths", [(100, 60), (60, 100), (41, 40)])
def test_a_curve_is_drawn_as_far_as_all_seeds_go(lengths):
    seeds = [[(float(step), step + offset) for step in range(length)] for offset, length in enumerate(lengths)]
    figure = draw_training("a study", {"base": seeds, "none": [[]]}, {"base": look(0)})
    assert figure is not None
    (line,) = figure.axes[0].lines
    assert line.get_xdata()[-1] < min(lengths)
    assert [y - x for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)] == [0.5] * len(line.get_xdata())


def test_a_long_curve_is_drawn_by_means():
    assert smoothed([(0.0, 1.0), (1.0, 3.0)]) == [(0.0, 1.0), (1.0, 3.0)]
    points = smoothed([(float(step), float(step % 2)) for step in range(400)])
    assert len(points) == 40 and {value for _, value in points} == {0.5}
