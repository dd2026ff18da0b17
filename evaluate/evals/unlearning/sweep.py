"""Which latents belong to the topic, the sweep over settings of the intervention, and the score picked from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

MIN_RETAINED = 0.99
"""Settings that keep less of the retained knowledge do not count."""


@dataclass(frozen=True)
class Sweep:
    """The interventions that are tried: every combination."""

    retain_thresholds: tuple[float, ...] = (0.001, 0.01)
    num_latents: tuple[int, ...] = (10, 20)
    multipliers: tuple[float, ...] = (25, 50, 100, 200)


@dataclass(frozen=True)
class Setting:
    """One intervention: these latents are clamped to -multiplier."""

    retain_threshold: float
    num_latents: int
    multiplier: float
    latents: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """Right answers under a setting, by exam: (right, asked)."""

    setting: Setting
    right: Mapping[str, tuple[int, int]]

    def accuracy(self, exams: Sequence[str]) -> float:
        """Pooled over exams: every question weighs the same."""
        right, asked = (sum(numbers) for numbers in zip(*(self.right[exam] for exam in exams), strict=True))
        return right / asked


def make_settings(forget_F: np.ndarray, retain_F: np.ndarray, sweep: Sweep) -> list[Setting]:
    """Every combination, in SAEBench's order. There may be fewer topic latents than requested, or none."""
    settings = []
    for threshold in sweep.retain_thresholds:
        ranked = topic_latents(forget_F, retain_F, threshold).tolist()
        settings += [
            Setting(threshold, number, multiplier, tuple(ranked[:number]))
            for number, multiplier in product(sweep.num_latents, sweep.multipliers)
        ]
    return settings


def unlearning_score(outcomes: Sequence[Outcome], forget: Sequence[str], retain: Sequence[str]) -> float:
    """1 minus the lowest accuracy on the topic among settings that keep at least 99 % of the rest; 0 if none does."""
    return 1.0 - min(
        outcome.accuracy(forget) if outcome.accuracy(retain) >= MIN_RETAINED else 1.0 for outcome in outcomes
    )


def topic_latents(forget_F: np.ndarray, retain_F: np.ndarray, retain_threshold: float) -> np.ndarray:
    """Latents by descending share on the forget text, without those that fire on the retain text too.

    Latents that fire on at least `retain_threshold` of the retain tokens, or never on the forget text,
    are left out. Among equal shares the higher index comes first: an ascending stable sort, reversed.
    """
    scores = np.where(retain_F >= retain_threshold, 0.0, forget_F)
    rising = scores.argsort(kind="stable")
    return rising[::-1][: np.count_nonzero(scores)]
