"""Confidence intervals by resampling documents, because tokens of one document are not independent.

A table holds the sums of each document; statistics are computed from their totals. A resample draws as many documents
as there are, with replacement. R documents, K sums, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache

import numpy as np

from ....cache_schema.numbers_in_words import counted

RESAMPLES_AT_ONCE = 50
KEPT_DRAWS = 1 << 22  # 32 MB
LEVEL = 0.95
FEWEST = 10  # documents for an interval: in simulations it holds the true mean in 91 % of cases, with 2 in 50 %

Sums = Mapping[str, np.ndarray]
Statistic = Callable[[Sums], np.ndarray]
"""From sums [S] by name to the statistic [S]."""


class DocumentSums:
    """Sums of per-token values by document, gathered batch by batch."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []

    def add(self, documents_N: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Add per-token values [N], by name; a NaN makes the sums of its document and of all NaN."""
        found, place = np.unique(documents_N, return_inverse=True)
        sums = {name: np.bincount(place, value, len(found)) for name, value in values.items()}
        self._parts.append((found, sums))

    def table(self) -> dict[str, np.ndarray]:
        """The sums of every document: [R] by name."""
        found, place = np.unique(np.concatenate([part[0] for part in self._parts]), return_inverse=True)
        names = self._parts[0][1]
        joined = {name: np.concatenate([part[1][name] for part in self._parts]) for name in names}
        return {name: np.bincount(place, values, len(found)) for name, values in joined.items()}


def describe_text(table: Sums) -> str:
    """How much text the sums cover, and whether it is too little for intervals."""
    documents = len(table["tokens"])
    few = f" (intervals need {FEWEST})" if documents < FEWEST else ""
    return f"{counted(int(table['tokens'].sum()), 'token')} of {counted(documents, 'document')}{few}"


def intervals(table: Sums, statistics: Mapping[str, Statistic], resamples: int) -> dict[str, list[float] | None]:
    """[low, high] of each statistic at `LEVEL`; None if documents are too few, resamples are off, or a bound is NaN."""
    if len(next(iter(table.values()))) < FEWEST or resamples < 1:
        return dict.fromkeys(statistics)
    sums = resampled(table, resamples)
    edges = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {name: np.quantile(statistic(sums), edges) for name, statistic in statistics.items()}
    return {name: None if np.isnan(at).any() else [float(edge) for edge in at] for name, at in found.items()}


def resampled(table: Sums, resamples: int) -> dict[str, np.ndarray]:
    """The sums [S] of each resample."""
    values_RK = np.stack([*table.values()], axis=1)
    sums_SK = np.concatenate([drawn_SR @ values_RK for drawn_SR in draws(len(values_RK), resamples)])
    return dict(zip(table, sums_SK.T, strict=True))


def draws(documents: int, resamples: int) -> Iterable[np.ndarray]:
    """How often each resample draws each document, some resamples at a time; the same for every SAE of a store."""
    return (_kept_draws if documents * resamples <= KEPT_DRAWS else _new_draws)(documents, resamples)


@lru_cache(maxsize=4)
def _kept_draws(documents: int, resamples: int) -> tuple[np.ndarray, ...]:
    return tuple(_new_draws(documents, resamples))


def _new_draws(documents: int, resamples: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(0)
    shares = np.full(documents, 1 / documents)
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, resamples - start)
        yield generator.multinomial(documents, shares, size=size).astype(np.float64)
