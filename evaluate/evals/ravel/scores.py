"""Cause and isolation: how often the right string came.

SAEBench recognises a pair for isolation by its equal first tokens. A cause pair whose two labels begin with the same
token is counted there, with the source's label: that is kept under SAEBench's keys. Scores by what each
pair was made for are our own (`by_kind`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from .answers import is_right
from .pairs import Pair


@dataclass(frozen=True)
class Scores:
    cause: float
    isolation: float

    @property
    def disentangle(self) -> float:
        return (self.cause + self.isolation) / 2

    def to_json(self) -> dict[str, float]:
        return {
            "cause_score": self.cause,
            "isolation_score": self.isolation,
            "disentangle_score": self.disentangle,
        }


def by_first_token(pairs: Sequence[Pair], completions: Sequence[str]) -> Scores:
    """By SAEBench's rule."""
    return _scores(pairs, completions, lambda pair: pair.target_token != pair.base.first_token)


def by_kind(pairs: Sequence[Pair], completions: Sequence[str]) -> Scores:
    """By what each pair was made for."""
    return _scores(pairs, completions, lambda pair: pair.is_cause)


def mean_scores(scores: Sequence[Scores]) -> Scores:
    return Scores(fmean(each.cause for each in scores), fmean(each.isolation for each in scores))


def _scores(pairs: Sequence[Pair], completions: Sequence[str], is_cause: Callable[[Pair], bool]) -> Scores:
    right: dict[bool, list[bool]] = {True: [], False: []}
    for pair, completion in zip(pairs, completions, strict=True):
        right[is_cause(pair)].append(is_right(pair.base.text, pair.label, completion))
    return Scores(_mean(right[True]), _mean(right[False]))


def _mean(right: Sequence[bool]) -> float:
    """NaN for none, which results are written with as -1."""
    return fmean(right) if right else float("nan")
