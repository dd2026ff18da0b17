"""Composition: decoder rows of a tier as sums of rows of the tier below, with non-negative weights.

F_t latents in tier t. For each tier except the first, E_t = mean over its latents of
||row - C^t rows below||^2, with C^t [F_t, F_(t-1)] >= 0. Rows have length one, so 1 - E_t is the mean
R^2 of the composition. Its gradient reaches C and both tiers' rows; the L1 norm of C keeps the parts few.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from ..engine.terms_and_constraints import Constraint
from ..sae.extra_modules import Extra
from ..sae.model import SparseAutoencoder
from ..sae.step_view import View, once
from .tiers import Tiers, tiers_of

COMPOSITION = "composition"
NEGLIGIBLE = 1e-3


class Composition(Extra):
    """C2, C3, ...: the composition of each tier's latents; tiers are counted from 1 here.

    Where latents may change tiers, the matrices have room for the largest size of a tier; row i is the i-th
    latent of the tier in ascending order, and rows beyond the tier's size are zero.
    """

    lr_scale = 10.0  # C must move by order 1, in steps of the learning rate

    def __init__(self, room: Sequence[int]) -> None:
        super().__init__()
        for tier in range(1, len(room)):
            setattr(self, f"C{tier + 1}", nn.Parameter(torch.zeros(room[tier], room[tier - 1])))

    def matrix(self, tier: int, tiers: Tiers) -> Tensor:
        """[F_t, F_(t-1)] of the tier, counted from 0."""
        return self._table(tier)[: len(tiers.members(tier)), : len(tiers.members(tier - 1))]

    @torch.no_grad()
    def follow(self, view: View, before: Tensor, after: Tensor) -> None:
        """Adapt to a change of membership: latents that stayed keep their entries and the optimiser's moments of these,
        others start at 0."""
        for tier in range(1, int(after.max()) + 1):
            table = self._table(tier)
            (old_rows, new_rows), (old_columns, new_columns) = (_stayed(before, after, t) for t in (tier, tier - 1))
            for entries in (table, *view.moments(table)):
                kept = entries[old_rows[:, None], old_columns]
                entries.zero_()
                entries[new_rows[:, None], new_columns] = kept

    @torch.no_grad()
    def observe(self, view: View) -> None:
        """Log how well and how sparsely each tier is composed."""
        tiers = tiers_of(view)
        errors = composition_errors(view)
        for tier in range(1, tiers.num_tiers):
            C = self.matrix(tier, tiers)
            view.note(f"composition/r2_{tier + 1}", 1.0 - errors[tier - 1])
            view.note(f"composition/sparsity_{tier + 1}", (C <= NEGLIGIBLE).sum() / C.numel())

    def _table(self, tier: int) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self, f"C{tier + 1}"))


class NonNegative(Constraint):
    """Keep C from falling below zero."""

    table_use = "none"

    @torch.no_grad()
    def after_step(self, sae: SparseAutoencoder) -> None:
        for table in sae.extras[COMPOSITION].parameters():
            table.clamp_min_(0.0)


def composition_of(view: View) -> Composition:
    return cast(Composition, view.sae.extras[COMPOSITION])


@once
def composition_errors(view: View) -> Tensor:
    """[T - 1], mean squared distance of each tier's decoder rows from their compositions."""
    tiers, composition = tiers_of(view), composition_of(view)
    rows = [view.sae.W_dec[tiers.members(tier)] for tier in range(tiers.num_tiers)]
    left = [own - composition.matrix(tier, tiers) @ below for tier, (below, own) in enumerate(pairwise(rows), start=1)]
    return torch.stack([part.square().sum() / len(part) for part in left])


def composition_loss(view: View) -> Tensor:
    """Mean of the composition errors over tiers."""
    return composition_errors(view).mean()


def composition_l1(view: View) -> Tensor:
    """Mean over tiers of the mean over latents of the sum of a latent's weights."""
    tiers, composition = tiers_of(view), composition_of(view)
    matrices = [composition.matrix(tier, tiers) for tier in range(1, tiers.num_tiers)]
    return torch.stack([C.abs().sum() / len(C) for C in matrices]).mean()


def _stayed(before: Tensor, after: Tensor, tier: int) -> tuple[Tensor, Tensor]:
    """Old and new index in the tier of each latent that stayed in it."""
    was, now = before == tier, after == tier
    stayed = was & now
    return (was.cumsum(0) - 1)[stayed], (now.cumsum(0) - 1)[stayed]
