"""Whether the SAEs of a run differ, and what that decides.

Each SAE is compared with the base and with each control, at each measure that it was not trained on. With the same
seed, both saw the same text in the same order from the same initial weights, so differences are taken seed by seed,
with intervals, and p corrected for the number of comparisons.

The rule is that of `docs/studies/questions.md`, written down before the runs:

1. A budget counts if the base has converged: doubling its length gained less than `MOST_GROWTH` of explained
   variance, known for every seed.
2. A measure counts if no sanity baseline does as well at it as the base.
3. A method helps if it beats its base and all its controls at one measure, corrected for all comparisons of the run,
   and by the same test is worse than none of them at the others. It does not help if every interval against the base
   excludes a gain of one standard deviation of the base over seeds (any gain found, where these are all alike).
   Anything else is undecided, and so is a method without a number at a measure that counts; one whose base is alike in
   all seeds at every measure, which amounts to one seed; and a gain with more active latents than the base has, as
   more latents explain more whatever the method.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from scipy import stats

LEVEL = 0.05
ALIKE = 1e-9
"""Relative to a difference: a smaller spread over seeds is rounding, and says nothing about other seeds."""
DECISIVE = "decisive"
"""The run of a study that the rule applies to, on this model and with this many seeds or more."""
MODEL, SEEDS = "smollm2", 5
MOST_GROWTH = 0.01
"""The most that the last doubling of a budget may gain. Growth within a run says nothing: as the learning rate falls to
zero, every run grows at the end."""
MOST_L0 = 1.05
"""Relative to the base's, as a requested L0 is met only about this closely."""
Families = Mapping[str, Mapping[int, Mapping[str, float | None]]]
"""Values by SAE, seed and measure."""


@dataclass(frozen=True)
class Difference:
    """One SAE minus another, at one measure."""

    label: str
    against: str
    measure: str
    seeds: int
    mean: float
    half_width: float
    """Half of the 95 % interval of the mean, by Student's t over seeds."""
    p: float
    p_corrected: float = 1.0
    """Holm's, over all comparisons of the run."""

    @property
    def verdict(self) -> str:
        if self.p_corrected >= LEVEL:
            return "no difference shown"
        return "more" if self.mean > 0 else "less"


def compare(values: Families, against: Sequence[str], measures: Iterable[str]) -> list[Difference]:
    """All differences. A measure that fewer than two seeds have is not compared."""
    found = []
    for measure in measures:
        for label, own in values.items():
            for other in against:
                theirs = values.get(other, {})
                if label == other or (label in against and against.index(label) < against.index(other)):
                    continue  # two controls are compared once
                pairs = [(own[seed].get(measure), theirs[seed].get(measure)) for seed in own if seed in theirs]
                numbers = [a - b for a, b in pairs if a is not None and b is not None]
                if len(numbers) >= 2:
                    found.append(_difference(label, other, measure, numbers))
    return corrected(found)


def _difference(label: str, against: str, measure: str, numbers: Sequence[float]) -> Difference:
    mean, count = statistics.fmean(numbers), len(numbers)
    error = statistics.stdev(numbers) / count**0.5
    if error <= abs(mean) * ALIKE:  # no spread over seeds to test against: the p of a sign test instead
        p = 1.0 if mean == 0.0 else 2.0 ** (1 - count)
    else:
        p = float(2 * stats.t.sf(abs(mean) / error, count - 1))
    return Difference(label, against, measure, count, mean, half_width(numbers), p)


def half_width(numbers: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of at least two seeds, by Student's t."""
    count = len(numbers)
    return float(stats.t.ppf(1 - LEVEL / 2, count - 1)) * statistics.stdev(numbers) / count**0.5


def corrected(found: Sequence[Difference]) -> list[Difference]:
    """Holm's step-down correction: the chance of one false difference among all of them stays at the level."""
    order = sorted(range(len(found)), key=lambda i: found[i].p)
    result, highest = list(found), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(found) - rank) * found[index].p))
        result[index] = replace(found[index], p_corrected=highest)
    return result


@dataclass(frozen=True)
class Finding:
    """The rule's verdict on one SAE of a run, and the numbers behind it."""

    label: str
    verdict: str
    why: str


def judge(
    values: Families, against: Sequence[str], found: Sequence[Difference], measures: Sequence[str]
) -> list[Finding]:
    """A finding for every SAE that is not a base, control or sanity baseline. The first of `against` is the base."""
    base, *controls = against
    methods = methods_of(values, against)
    too_small = why_too_small([one.get("growth") for one in values.get(base, {}).values()])
    if too_small is not None:
        return [Finding(label, "not decided: budget too small", too_small) for label in methods]
    useless = list(matched_by_baselines(values, base, measures))
    used = [measure for measure in measures if measure not in useless]
    own = {label: own_controls(label, methods, controls) for label in methods}
    findings = [_judge(label, base, own[label], values, found, used) for label in methods]
    notes = "".join(f"; {note}" for note in _notes_of_baselines(values, useless, used))
    return [replace(one, why=one.why + notes) for one in findings]


def methods_of(values: Families, against: Sequence[str]) -> list[str]:
    """The SAEs that the rule judges."""
    return [label for label in values if label not in against and not is_baseline(label)]


def why_outside(models: set[str | None], seeds: int) -> str | None:
    """Why the rule does not apply to a run; None if it does."""
    if models == {MODEL} and seeds >= SEEDS:
        return None
    found = " and ".join(sorted(model or "an unknown model" for model in models)) or "no model"
    return f"the rule is about {SEEDS} seeds on {MODEL}, and this run is of {found}, {seeds} seeds"


def is_baseline(label: str) -> bool:
    """Whether `--with-baselines` made it."""
    return "_frozen_" in label or label.startswith("pca_")


def why_too_small(grown: Sequence[float | None]) -> str | None:
    """Why the budget does not count, from how much each seed of the base gained in its second half; None if it does."""
    known = [one for one in grown if one is not None]
    if not known:
        return "how much the base gained by the last doubling is not known: there is no run of it at half the length"
    if len(known) < len(grown):
        return f"how much the base gained by the last doubling is known of {len(known)} of its {len(grown)} seeds"
    mean = statistics.fmean(known)
    if mean < MOST_GROWTH:
        return None
    return f"the base explains {mean:.4f} more than at half the length, where less than {MOST_GROWTH} counts"


def matched_by_baselines(values: Families, base: str, measures: Iterable[str]) -> Iterator[str]:
    """Measures at which a sanity baseline comes within one standard deviation, over seeds, of the base."""
    for measure in measures:
        own = values_of(values[base], measure)
        if not own:
            continue
        least = statistics.fmean(own) - _deviation(own)
        others = [values_of(seeds, measure) for label, seeds in values.items() if is_baseline(label)]
        if any(other and statistics.fmean(other) >= least for other in others):
            yield measure


def _notes_of_baselines(values: Families, useless: Sequence[str], used: Sequence[str]) -> Iterator[str]:
    """Which measures were left out because of baselines, and at which baselines have no number."""
    if useless:
        yield f"not used, since a sanity baseline does as well: {', '.join(useless)}"
    baselines = [seeds for label, seeds in values.items() if is_baseline(label)]
    unasked = [measure for measure in used if not any(values_of(seeds, measure) for seeds in baselines)]
    if not baselines:
        yield "there is no sanity baseline"
    elif unasked:
        yield f"no sanity baseline has a number at {', '.join(unasked)}"


def own_controls(label: str, methods: Sequence[str], controls: Sequence[str]) -> list[str]:
    """The controls except those of other methods: `encoders_scattered` is the control of `encoders`."""
    return [one for one in controls if not any(one.startswith(f"{other}_") for other in methods if other != label)]


def _judge(
    label: str, base: str, controls: Sequence[str], values: Families, found: Sequence[Difference], used: Sequence[str]
) -> Finding:
    rivals = (base, *controls)
    own = (one for one in found if one.label == label and one.against in rivals and one.measure in used)
    differences = {(one.against, one.measure): one for one in own}
    to_base = [one for (other, _), one in differences.items() if other == base]
    if not to_base:
        return Finding(label, "undecided", "no measure that counts has a number")
    missing = [measure for measure in used if any((other, measure) not in differences for other in rivals)]
    worse = [f"worse than {one.against} at {one.measure}" for one in differences.values() if one.verdict == "less"]
    better = [
        one.measure
        for one in to_base
        if all((other := differences.get((rival, one.measure))) and other.verdict == "more" for rival in rivals)
    ]
    names = " and ".join(rivals)
    losses = ", ".join(worse) or f"worse than {' or '.join(rivals)} at nothing"
    gains = f"better than {names} at {', '.join(better)}" if better else f"better than all of {names} at nothing"
    deviations = {one.measure: _deviation(values_of(values[base], one.measure)) for one in to_base}
    possible = [one.measure for one in to_base if _may_gain(one, deviations[one.measure])]
    fewer = sorted({one.measure for one in differences.values() if one.seeds < len(values[base])}, key=used.index)
    of_fewer = f"; of fewer than {len(values[base])} seeds: {', '.join(fewer)}" if fewer else ""
    if missing:
        return Finding(label, "undecided", f"not measured: {', '.join(missing)}; {gains}; {losses}{of_fewer}")
    if better and not worse:
        denser = _why_denser(values, label, base)
        return Finding(label, "undecided" if denser else "helps", f"{gains}, {losses}{denser}{of_fewer}")
    if any(deviations.values()) and not possible:
        why = f"no interval leaves room for a gain of one deviation; {losses}{of_fewer}"
        return Finding(label, "does not help", why)
    not_excluded = f"a gain is not excluded at {', '.join(possible) or 'any'}"
    return Finding(label, "undecided", f"{gains}; {losses}; {not_excluded}{of_fewer}")


def _why_denser(values: Families, label: str, base: str) -> str:
    """A note if an SAE has more active latents than the base, on average over seeds; otherwise empty."""
    found = [values_of(values[one], "l0") for one in (label, base)]
    if not all(found):
        return ""
    own, of_base = map(statistics.fmean, found)
    return f"; not at equal sparsity, L0 {own:.1f} against {of_base:.1f}" if own > MOST_L0 * of_base else ""


def _may_gain(one: Difference, deviation: float) -> bool:
    """Whether the interval leaves room for a gain of one deviation. If the base's seeds are all alike, that is zero,
    which the interval of an SAE just like the base always includes: then only a gain that was found counts."""
    return one.mean + one.half_width >= deviation if deviation > 0.0 else one.mean > 0.0


def values_of(seeds: Mapping[int, Mapping[str, float | None]], measure: str) -> list[float]:
    """The values of a measure, for the seeds that have it."""
    return [value for one in seeds.values() if (value := one.get(measure)) is not None]


def _deviation(numbers: Sequence[float]) -> float:
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0
