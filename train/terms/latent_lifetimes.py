"""Latents over time: running variances, lifetimes, and retired latents.

B rows, F latents. After a given share of the run, every N steps, latents whose running variance is below a
share of the mean variance are retired: they never fire again, and the auxiliary loss ignores them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.terms_and_constraints import Constraint
from ..sae.extra_modules import StepCounter
from ..sae.model import SparseAutoencoder
from ..sae.side_inputs import Side
from ..sae.step_view import View

SILENT = -1.0  # encoder bias of a retired latent, whose encoder row is zero
PRUNE = "prune"
SCALES = ("short", "medium", "long")
EPSILON = 1e-6


class Dynamics(StepCounter):
    """Running moments of activations, the groups of latents, and which are retired."""

    group: Tensor
    retired: Tensor
    mean: Tensor
    square: Tensor

    def __init__(
        self, group_sizes: Sequence[int], prune_every_steps: int = 1, prune_share: float = 0.0, floor: float = 0.0
    ) -> None:
        """Shares of the mean variance: latents below `prune_share` are retired, those below `floor` left out of the
        temporal losses."""
        super().__init__()
        groups = torch.arange(len(group_sizes)).repeat_interleave(
            torch.tensor(tuple(group_sizes)), output_size=sum(group_sizes)
        )
        self.prune_every_steps, self.prune_share, self.floor = prune_every_steps, prune_share, floor
        self.register_buffer("group", groups)
        self.register_buffer("retired", torch.zeros(len(groups), dtype=torch.bool))
        self.register_buffer("mean", torch.zeros(len(groups)))
        self.register_buffer("square", torch.zeros(len(groups)))

    @property
    def variance(self) -> Tensor:
        """[F], variance of each latent's activation over tokens."""
        return (self.square - self.mean.square()).clamp_min(0.0)

    def weights(self, by_variance: bool) -> Tensor:
        """[F], the weight of each latent in a cosine: 1, or 1 / variance; 0 below the floor."""
        if self.steps_seen == 0:
            return torch.ones_like(self.mean)
        relative = self.variance / self.variance.mean().clamp_min(EPSILON)
        weights = 1.0 / (relative + 0.01) if by_variance else torch.ones_like(relative)
        return torch.where(relative >= self.floor, weights, 0.0)

    def retired_latents(self, knobs: Mapping[str, float]) -> Tensor:
        return self.retired

    @torch.no_grad()
    def observe(self, view: View) -> None:
        mean, square = _moments(view)
        weight = self.weight_of_step
        self.mean.lerp_(mean, weight)
        self.square.lerp_(square, weight)
        self.add_step()
        is_due = self.steps_seen % self.prune_every_steps == 0
        if self.prune_share > 0 and view.side.knob(PRUNE, 0.0) and is_due:
            self.retired |= self.variance < self.prune_share * self.variance.mean()
            silence(view.sae, self.retired)  # at once: this may be the last step
        view.note("temporal/activation_variance", (square - mean.square()).mean())
        view.note("temporal/lifetime", mean_lifetime(view))
        view.note("temporal/pruned", self.retired.sum())
        for scale in SCALES:
            if not view.side.knob(f"temporal_{scale}", 0.0):  # otherwise its term has logged its weight
                view.note(f"temporal/weight_{scale}", view.x.new_zeros(()))


@dataclass(frozen=True)
class Retire(Constraint):
    """Keep latents that `dynamics` has retired silent; latents retired by other extras are not affected."""

    dynamics: Dynamics
    table_use = "gradients"

    @torch.no_grad()
    def before_step(self, sae: SparseAutoencoder) -> None:
        for table in (sae.W_enc.grad, sae.b_enc.grad, sae.W_dec.grad):
            if table is not None:
                table.masked_fill_(_along(table, self.dynamics.retired), 0.0)

    def after_step(self, sae: SparseAutoencoder) -> None:
        silence(sae, self.dynamics.retired)


@torch.no_grad()
def silence(sae: SparseAutoencoder, retired_F: Tensor) -> None:
    """Zero the encoder rows of retired latents; a negative bias keeps them closed."""
    sae.W_enc.masked_fill_(_along(sae.W_enc, retired_F), 0.0)
    sae.b_enc.masked_fill_(retired_F, SILENT)


def _along(table: Tensor, retired_F: Tensor) -> Tensor:
    """The retired latents, in a shape that broadcasts over a table's rows."""
    return retired_F if table.ndim == 1 else retired_F[:, None]


def rows_before(side: Side, lag: int) -> Tensor:
    """int64 [B], the row `lag` tokens before each row in the same window and document, or -1."""
    earlier, document = side["position"] - lag, side["document"]
    row = side["row_of"][side["window"], earlier.clamp_min(0)]
    return torch.where((earlier >= 0) & (document[row] == document), row, -1)


def mean_lifetime(view: View) -> Tensor:
    """Mean number of consecutive tokens for which a latent stays active, within the batch's documents."""
    codes = view.codes
    before = rows_before(view.side, 1)
    active = codes.values.detach() != 0
    if codes.support is None:
        continued = active & active[before] & (before >= 0)[:, None]
    else:
        rows, latents = codes.support.rows.long(), codes.support.latents.long()
        table = active.new_zeros(codes.num_rows, codes.num_latents)
        table[rows, latents] = active
        continued = active & table[before[rows], latents] & (before[rows] >= 0)
    total = active.sum()
    return total / (total - continued.sum()).clamp_min(1)


def _moments(view: View) -> tuple[Tensor, Tensor]:
    """[F] each: mean activation and mean square over the global batch."""
    codes, ranks = view.codes, view.side.ranks
    mean = codes.latent_totals() / codes.num_rows
    square = codes.map(torch.square).latent_totals() / codes.num_rows
    return ranks.mean(mean), ranks.mean(square)
