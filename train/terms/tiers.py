"""Tiers: nested sets of latents that each reconstruct on their own, and the weight of each.

B rows, F latents, T tiers; set t holds the latents of tiers 0 to t, L_t is the share of variance that
it leaves unexplained.
- `fixed`: sum of w_t L_t with given weights that sum to 1.
- `uncertainty`: sum of exp(-s_t) L_t, each s_t learned by exp(-s_t) L_t + s_t, so exp(-s_t) tends to
  1 / L_t. A plain learned softmax would put everything on the tier that is easiest to satisfy.
- `learned`: the same s_t, starting at 0, with weights w_t exp(-s_t) divided by their sum: a tier's weight is
  relative to what it leaves. Reconstruction then weighs as much as in the base, so that a penalty on
  activity has the same effect as there, and low tiers, whose losses stay large, do not dominate.

Composition: decoder rows of a tier as sums of rows of the tier below, with non-negative weights. F_t latents in tier t.
For each tier except the first, E_t = mean over its latents of ||row - C^t rows below||^2, with C^t [F_t, F_(t-1)] >= 0.
Rows have length one, so 1 - E_t is the mean R^2 of the composition. Its gradient reaches C and both tiers' rows; the L1
norm of C keeps compositions sparse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ..sae.extra_modules import Extra
from ..sae.kernels.hardware import numbers
from ..sae.kernels.nested_prefixes import Tiering, tier_errors
from ..sae.kernels.sparse_support import group_of_each, index_sum
from ..sae.step_view import View, once

Importance = Literal["learned", "uncertainty", "fixed"]
TIERS = "tiers"
COMPOSITION = "composition"
NEGLIGIBLE = 1e-3  # weights of a composition up to this are logged as zeros


class Tiers(Extra):
    """Which tier each latent belongs to, and the importance of each tier."""

    is_recordable = True
    lr_scale = 30.0  # s_t must move by order 1, in steps of the learning rate
    membership: Tensor
    weight: Tensor
    grad_norm: Tensor

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], importance: Importance) -> None:
        super().__init__()
        self.num_tiers = len(sizes)
        self.importance: Importance = importance
        self.register_buffer("membership", group_of_each(sizes))
        shares = torch.tensor(tuple(weights)) / sum(weights)
        self.register_buffer("weight", shares)
        if importance != "fixed":
            start = -shares.log() if importance == "uncertainty" else torch.zeros(len(sizes))
            self.log_variance = nn.Parameter(start)
        self.register_buffer("grad_norm", torch.zeros(len(sizes)), persistent=False)
        self.notes_grad_norm = False
        self._tiering: tuple[int, Tiering] | None = None

    @property
    def tiering(self) -> Tiering:
        """The latents of each tier, recomputed when a latent may have moved."""
        version = self.membership._version
        if self._tiering is None or self._tiering[1].tier is not self.membership or self._tiering[0] != version:
            self._tiering = version, Tiering(self.membership, self.num_tiers)
        return self._tiering[1]

    def members(self, tier: int) -> Tensor:
        """int64, the latents of a tier in ascending order."""
        return self.tiering.members[tier]

    def weights(self, on_T: Tensor) -> Tensor:
        """[T], the weight of each tier's loss, without gradient; 0 for tiers that are off."""
        if self.importance == "uncertainty":
            return torch.exp(-self.log_variance.detach()) * on_T
        learned = 1.0 if self.importance == "fixed" else torch.exp(-self.log_variance.detach())
        raw = self.weight * learned * on_T
        return raw / raw.sum().clamp_min(1e-30)  # possibly no tier with a weight is on

    def retired_latents(self, knobs: Mapping[str, float]) -> Tensor | None:
        """Latents of tiers that the curriculum has not switched on. Once on, they count as dead until they fire, and
        the auxiliary loss revives them: without it during a tier's rise, fewer planted children were found."""
        is_off = [on == 0 for on in shares_on(knobs, self.num_tiers)]
        return numbers(is_off, self.membership).bool()[self.membership] if any(is_off) else None

    @torch.no_grad()
    def observe(self, view: View) -> None:
        """Log activity, size and importance of each tier; the log counts tiers from 1."""
        fired = view.fired / view.side.ranks.rows(view.x.shape[0])
        active = index_sum(fired.to(self.weight.dtype), self.membership, self.num_tiers)
        weights = self.weights(switched_on(view, self.num_tiers))
        for tier in range(self.num_tiers):
            size = len(self.members(tier))
            view.note(f"tiers/activity_{tier + 1}", active[tier] / size)
            view.note(f"tiers/size_{tier + 1}", size)
            view.note(f"tiers/importance_{tier + 1}", weights[tier])
            if self.notes_grad_norm:
                view.note(f"tiers/grad_norm_{tier + 1}", self.grad_norm[tier])


def tiers_of(view: View) -> Tiers:
    return cast(Tiers, view.sae.extras[TIERS])


def switch_name(tier: int) -> str:
    """The knob for how far a tier takes part; names count tiers from 1."""
    return f"tier_{tier + 1}"


def shares_on(knobs: Mapping[str, float], num_tiers: int) -> list[float]:
    """How far each tier takes part, from 0 to 1; 1 for a tier without a schedule."""
    return [knobs.get(switch_name(tier), 1.0) for tier in range(num_tiers)]


def switched_on(view: View, num_tiers: int) -> Tensor:
    """[T], how far each tier takes part at this step."""
    return numbers(shares_on(view.side.knobs, num_tiers), view.x)


@once
def tier_losses(view: View) -> Tensor:
    """[T], the share of variance that the tiers up to each one leave unexplained."""
    return _tier_errors(view)[0] / view.stats.variance


def tier_residual(view: View) -> Tensor:
    """What all tiers together leave of the target."""
    return _tier_errors(view)[1]


@once
def _tier_errors(view: View) -> tuple[Tensor, Tensor]:
    sae, tiers = view.sae, tiers_of(view)
    return tier_errors(view.codes, sae.W_dec, sae.b_dec, view.target, tiers.tiering)


@dataclass(frozen=True)
class TieredReconstruction:
    """Weighted sum of the tiers' losses; `scaled` divides the gradient of each loss by the loss if that is over 1."""

    scaled: bool = False

    def __call__(self, view: View) -> Tensor:
        losses = tier_losses(view)
        if self.scaled:
            losses = losses / losses.detach().clamp_min(1.0)
        tiers = tiers_of(view)
        return (losses * tiers.weights(switched_on(view, tiers.num_tiers))).sum()


def importance_loss(view: View) -> Tensor:
    """Sum of exp(-s_t) L_t + s_t with L_t constant, minus its minimum, so that it is 0 where s_t = log L_t.

    It trains only s_t.
    """
    losses = view.side.ranks.mean(tier_losses(view).detach()).clamp_min(1e-12)
    s = tiers_of(view).log_variance
    return (torch.exp(-s) * losses + s - losses.log() - 1.0).sum()


class Composition(Extra):
    """C2, C3, ...: the composition of each tier's latents, where the names count tiers from 1.

    If latents may change tiers, the matrices have room for a tier's largest size; row i is the i-th latent of the tier
    in ascending order, and rows beyond the tier's size are zero.
    """

    is_recordable = True
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
        """Adapt to a change of membership: latents that stayed keep their entries and the optimiser's moments of these;
        all others start at 0."""
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
    """The old and new indices in the tier of the latents that stayed in it."""
    was, now = before == tier, after == tier
    stayed = was & now
    return (was.cumsum(0) - 1)[stayed], (now.cumsum(0) - 1)[stayed]
