"""The rule of `docs/studies/questions.md`, as written there before the runs: what the numbers of a run decide.

1. A budget counts if the base has converged: for half as long it explains less than `MOST_GROWTH` less.
2. A measure counts if no sanity baseline does as well at it as the base.
3. A method helps if it is better than its base and than every control that it has at one measure, corrected for all
   comparisons of the run, and worse than its base at none. It does not help if every interval against the base leaves
   out a gain of one standard deviation of the base over seeds. Anything else is undecided.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .comparisons import Difference

MOST_GROWTH = 0.01
"""By the last doubling. Within a run growth says nothing: as the rate falls to zero, every run grows in the end."""
Families = Mapping[str, Mapping[int, Mapping[str, float | None]]]
"""Values by SAE, seed and measure."""


@dataclass(frozen=True)
class Finding:
    """What the rule says of one SAE of a run, and the numbers that it says so for."""

    label: str
    verdict: str
    why: str


def judge(values: Families, against: Sequence[str], found: Sequence[Difference]) -> list[Finding]:
    """Of every SAE that is neither base nor control nor sanity baseline. The first of `against` is the base."""
    base, *controls = against
    methods = [label for label in values if label not in against and not is_baseline(label)]
    too_small = why_too_small([one.get("growth") for one in values.get(base, {}).values()])
    if too_small is not None:
        return [Finding(label, "not decided: budget too small", too_small) for label in methods]
    useless = set(matched_by_baselines(values, base, {one.measure for one in found}))
    used = [one for one in found if one.measure not in useless]
    findings = [_judge(label, base, own_controls(label, methods, controls), values, used) for label in methods]
    without = f"; not used, since a sanity baseline does as well: {', '.join(sorted(useless))}" if useless else ""
    return [replace(one, why=one.why + without) for one in findings]


def is_baseline(label: str) -> bool:
    """Whether `--with-baselines` made it."""
    return "_frozen_" in label or label.startswith("pca_")


def why_too_small(grown: Sequence[float | None]) -> str | None:
    """What is wrong with the budget, by how much each seed of the base gained by its second half; None if it counts."""
    known = [one for one in grown if one is not None]
    if not known:
        return "how much the base gained by the last doubling is not known: there is no run of it at half the length"
    mean = statistics.fmean(known)
    if mean < MOST_GROWTH:
        return None
    return f"the base explains {mean:.4f} more than at half the length, where less than {MOST_GROWTH} counts"


def matched_by_baselines(values: Families, base: str, measures: Iterable[str]) -> Iterator[str]:
    """Measures at which a sanity baseline comes within one standard deviation, over seeds, of the base."""
    for measure in measures:
        own = _of(values[base], measure)
        if not own:
            continue
        least = statistics.fmean(own) - _deviation(own)
        others = [_of(seeds, measure) for label, seeds in values.items() if is_baseline(label)]
        if any(other and statistics.fmean(other) >= least for other in others):
            yield measure


def own_controls(label: str, methods: Sequence[str], controls: Sequence[str]) -> list[str]:
    """Without those that break another method: `encoders_scattered` is the control of `encoders`."""
    return [one for one in controls if not any(one.startswith(f"{other}_") for other in methods if other != label)]


def _judge(label: str, base: str, controls: Sequence[str], values: Families, found: Sequence[Difference]) -> Finding:
    own = {(one.against, one.measure): one for one in found if one.label == label}
    to_base = [one for (other, _), one in own.items() if other == base]
    if not to_base:
        return Finding(label, "undecided", "no measure that counts has a number")
    worse = [one.measure for one in to_base if one.verdict == "less"]
    better = [
        one.measure
        for one in to_base
        if all((other := own.get((c, one.measure))) and other.verdict == "more" for c in (base, *controls))
    ]
    rivals = " and ".join((base, *controls))
    if better and not worse:
        return Finding(label, "helps", f"better than {rivals} at {', '.join(better)}, worse than {base} at nothing")
    moving = [(one, sd) for one in to_base if (sd := _deviation(_of(values[base], one.measure))) > 0.0]
    open_ones = [one.measure for one, sd in moving if one.mean + one.half_width >= sd]
    lost = f"worse than {base} at {', '.join(worse)}" if worse else f"worse than {base} at nothing"
    if moving and not open_ones:
        return Finding(label, "does not help", f"no interval leaves room for a gain of one deviation; {lost}")
    gained = f"better than {rivals} at {', '.join(better)}" if better else f"better than all of {rivals} at nothing"
    return Finding(label, "undecided", f"{gained}; {lost}; a gain is not excluded at {', '.join(open_ones) or 'any'}")


def _of(seeds: Mapping[int, Mapping[str, float | None]], measure: str) -> list[float]:
    return [value for one in seeds.values() if (value := one.get(measure)) is not None]


def _deviation(numbers: Sequence[float]) -> float:
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0
