"""Measure SAEs on text they were not trained on: one pass over held-out windows for a whole fleet.

B rows, D residual width, F latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.drawn_rows import Draw
from ..engine.fleet_of_saes import Fleet
from ..engine.step import Trainee
from ..parallel.sums_over_processes import ALONE

DIVERGED = "what it rebuilds of held-out text is not finite: training diverged in the last steps"
ROUNDING = 1e-12  # error of a difference of float64 sums, as a share of the squares


@dataclass
class Tally:
    """Sums over tokens, in float64, from which the results are computed. `total` is the sum of all targets [D]."""

    tokens: int = 0
    active: float = 0.0
    squared_error: float = 0.0
    squares: float = 0.0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, target: Tensor, x_hat: Tensor, active: Tensor) -> None:
        """`active` [B]: the number of active latents of each row."""
        exact = target.double()
        self.tokens += len(target)
        self.active += float(active.sum())
        self.squared_error += float((exact - x_hat.double()).square().sum())
        self.squares += float(exact.square().sum())
        self.total = self.total.to(target.device) + exact.sum(dim=0)

    @property
    def l0(self) -> float:
        """Mean number of active latents of a token."""
        return self.active / max(self.tokens, 1)

    @property
    def explained_variance(self) -> float | None:
        """1 - E||x - x_hat||^2 / E||x - mean||^2 over all tokens; None if they are all alike, or there are none."""
        variance = self.squares - float(self.total.square().sum()) / max(self.tokens, 1)
        return 1.0 - self.squared_error / variance if variance > ROUNDING * self.squares else None


@dataclass
class HeldOut:
    """Measurements of one SAE: on ordinary rows, and on all rows including massive ones."""

    ordinary: Tally = field(default_factory=Tally)
    every: Tally = field(default_factory=Tally)

    def add(self, target: Tensor, x_hat: Tensor, active: Tensor, is_ordinary: Tensor) -> None:
        self.every.add(target, x_hat, active)
        self.ordinary.add(target[is_ordinary], x_hat[is_ordinary], active[is_ordinary])

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.every.squared_error)


@torch.no_grad()
def validate(fleet: Fleet, draws: Iterable[Draw]) -> dict[str, HeldOut]:
    """Measure every SAE that has not diverged, using the codes that the saved SAE computes."""
    found = {label: HeldOut() for label in fleet.training}
    for draw in draws:
        for label, trainee in fleet.training.items():
            batch = draw.batch(fleet.needs[label])
            active, x_hat = _reconstruct(trainee, batch)
            target = batch.x if batch.target is None else batch.target
            found[label].add(target, x_hat, active, draw.ordinary(fleet.needs[label]))
    return found


def _reconstruct(trainee: Trainee, batch: Batch) -> tuple[Tensor, Tensor]:
    side = trainee.assembly.side(batch.side, trainee.total_steps, trainee.total_steps, ALONE)
    acts = trainee.sae.encode(batch.x, side)
    active = torch.linalg.vector_norm(acts, 0, dim=1)  # `count_nonzero` makes a table of int64
    return active, trainee.sae.skip(batch.x, trainee.sae.decode(acts))
