"""Whether SAEs of a run differ: paired by seed, with intervals, corrected for how many comparisons there are.

Each SAE is compared with the base and with each control, at each measure that it was not trained on. At each seed
the two saw the same text in the same order from the same initial weights, so differences are taken seed by seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from scipy import stats

LEVEL = 0.05
ALIKE = 1e-9
"""Relative to a difference: a smaller spread over seeds is rounding, and says nothing about other seeds."""


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


def compare(
    values: Mapping[str, Mapping[int, Mapping[str, float | None]]], against: Sequence[str], measures: Iterable[str]
) -> list[Difference]:
    """`values` by label, seed and measure. A measure that fewer than two seeds have is not compared."""
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
    if error <= abs(mean) * ALIKE:  # without a spread of seeds to test by, the p of a test by their signs
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
