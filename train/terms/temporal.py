"""Latents over time: consistency of their codes, running variances, lifetimes, and retired latents.

After a given share of the run, every N steps, latents whose running variance is below a share of the mean variance are
retired: they never fire again, and the auxiliary loss ignores them.

Consistency: the codes of a group of latents should change slowly over the window.
B rows, F latents, F_g of them in a group, j = i - lag the row that row i is compared with.
L = mean of 1 - cos(f_i, h_j) over pairs in which either row has an active latent; a silent row has
cosine 0. h is the past, read without gradient: f itself, or with mixing m < 1 the running mean
h_j = (m f_j + (1 - m) (m f_(j-1) + ...)) / (the same sum of ones). In each document it starts empty, or at random
numbers, redrawn in each step, whose weight after n tokens is (1 - m)^n.
Each scale draws a new lag in each step. Pairs stay within one document, and within pieces of the window
whose length may grow over the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.terms_and_constraints import Constraint
from ..sae.extra_modules import StepCounter
from ..sae.kernels.codes import Codes
from ..sae.kernels.hardware import reads_at_once
from ..sae.kernels.sparse_products_with_gradients import affine
from ..sae.kernels.sparse_support import Support, group_of_each, starts
from ..sae.kernels.window_gram import other_window
from ..sae.model import SparseAutoencoder
from ..sae.side_inputs import Side
from ..sae.step_view import View, once

SILENT = -1.0  # encoder bias of a retired latent, whose encoder row is zero
PRUNE = "prune"
SCALES = ("short", "medium", "long")
EPSILON = 1e-6
Adaptive = Literal["none", "gradient", "variance"]
TEMPORAL = "temporal"
PIECE = "temporal_window"
MAX_RATIO = 100.0  # of gradient norms
TINY = 1e-12


class Dynamics(StepCounter):
    """Running moments of activations, the groups of latents, and which are retired."""

    group: Tensor
    retired: Tensor
    mean: Tensor
    square: Tensor

    def __init__(
        self, group_sizes: Sequence[int], prune_every_steps: int = 1, prune_share: float = 0.0, floor: float = 0.0
    ) -> None:
        """Shares of the mean variance: latents below `prune_share` of it are retired, and those below `floor` left out
        of the temporal losses."""
        super().__init__()
        groups = group_of_each(group_sizes)
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
        codes, mean_of = view.codes, view.side.ranks.mean
        mean = mean_of(codes.latent_totals() / codes.num_rows)
        square = mean_of(codes.map(torch.square).latent_totals() / codes.num_rows)
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
            if not view.side.knob(f"temporal_{scale}", 0.0):  # otherwise the scale's term has logged it
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


@dataclass(frozen=True)
class Consistency:
    """The loss of one scale: lags `first` to `last`, on the latents `start` to `stop`."""

    scale: str
    first: int
    last: int
    start: int
    stop: int
    adaptive: Adaptive = "none"
    mixing: float = 1.0
    apart: bool = False
    """A control: the past comes from another window."""
    start_std: float = 0.0
    """Standard deviation of the random numbers at which a mixed past starts; 0: it starts empty."""

    def __call__(self, view: View) -> Tensor:
        lag = int(torch.randint(self.first, self.last + 1, (), generator=view.generator))
        part = part_of(view.codes, self.start, self.stop)
        start = self._start(view) if self.start_std > 0 else None
        dynamics = cast(Dynamics, view.sae.extras[TEMPORAL])
        weights = dynamics.weights(self.adaptive == "variance")[self.start : self.stop]
        loss = inconsistency(view, part, weights, lag, self.mixing, self.apart, start)
        view.note(f"temporal/inconsistency_{self.scale}", loss)
        ratio = gradient_ratio(view, loss) if self.adaptive == "gradient" else view.x.new_ones(())
        view.note(f"temporal/weight_{self.scale}", ratio * view.side.knob(f"temporal_{self.scale}", 0.0))
        return ratio * loss if self.adaptive == "gradient" else loss

    def _start(self, view: View) -> Tensor:
        """[F_g]"""
        width, generator = self.stop - self.start, view.generator
        drawn = view.draw(lambda: torch.randn(width, generator=generator))
        return self.start_std * drawn


def part_of(codes: Codes, start: int, stop: int) -> Codes:
    """The codes of only the latents `start` to `stop`.

    On a GPU all entries stay, the others as zeros of an extra latent: to select entries the host would have to wait.
    """
    if codes.support is None:
        return Codes(codes.values[:, start:stop], None, codes.num_rows, stop - start)
    latents, rows, size = codes.support.latents, codes.support.rows, stop - start
    if not reads_at_once(latents):
        inside = (latents >= start) & (latents < stop)
        support = Support(codes.support.offsets, torch.where(inside, latents - start, size), size + 1)
        return Codes(torch.where(inside, codes.values, 0.0), support, codes.num_rows, size + 1)
    kept = ((latents >= start) & (latents < stop)).nonzero().view(-1)
    offsets = starts(torch.bincount(rows[kept], minlength=codes.num_rows))
    return Codes(codes.values[kept], Support(offsets, latents[kept] - start, size), codes.num_rows, size)


def inconsistency(
    view: View,
    part: Codes,
    weight_F: Tensor,
    lag: int,
    mixing: float = 1.0,
    apart: bool = False,
    start_F: Tensor | None = None,
) -> Tensor:
    """Mean of 1 - cos(f_i, h_(i - lag)) with the latents weighted in the cosine."""
    extra = (0, part.num_latents - len(weight_F))  # the extra latent of `part_of`
    weight_F = functional.pad(weight_F, extra)
    start_F = None if start_F is None else functional.pad(start_F, extra)
    past = past_rows(view.side, lag)
    if apart:
        past = torch.where(past >= 0, rows_apart(view.side, lag), -1)
    has_past = past >= 0
    past_BF = remembered(view.side, part.dense().detach(), mixing, start_F)
    past_norms = (past_BF.square() @ weight_F).clamp_min(TINY).sqrt()[past]
    values, weight = part.values, part.per_latent(weight_F)
    norms = part.sum_over_latents(weight * values.square())
    dots = part.sum_over_latents(weight * values * read_rows(past_BF, part, past))
    either = has_past & ((norms.detach() > TINY) | (past_norms**2 > TINY))
    # A silent row passes on no gradient: divided by almost zero, it would drown out all others.
    cosine = torch.where(norms > TINY, dots, 0.0) / (norms.clamp_min(TINY).sqrt() * past_norms)
    return torch.where(either, 1.0 - cosine, 0.0).sum() / view.side.ranks.share(either.sum())


def past_rows(side: Side, lag: int) -> Tensor:
    """int64 [B], the row `lag` tokens before each row in the same document and piece of its window, or -1."""
    position = side["position"]
    length = int(side.knob(PIECE, side["row_of"].shape[1]))
    together = (position - lag) // length == position // length
    return torch.where(together, rows_before(side, lag), -1)


def rows_apart(side: Side, lag: int) -> Tensor:
    """int64 [B], the row `lag` tokens before each row's position in another window, or -1."""
    window = other_window(side["window"], side["position"], side["row_of"].shape[0], "other_windows")
    return side["row_of"][window, (side["position"] - lag).clamp_min(0)]


def read_rows(table_BF: Tensor, part: Codes, rows_B: Tensor) -> Tensor:
    """The table's row `rows_B[i]` in the places of row i's codes."""
    if part.support is None:
        return table_BF[rows_B]
    return table_BF[rows_B[part.support.rows], part.support.latents]


def remembered(side: Side, acts_BF: Tensor, mixing: float, start_F: Tensor | None = None) -> Tensor:
    """[B, F_g], the running mean of the document's past up to and including each row."""
    if mixing == 1.0:
        return acts_BF
    places = side.places
    context = places.row_of.shape[1]
    place = torch.arange(context, device=acts_BF.device)
    age = place[:, None] - place
    length = int(side.knob(PIECE, context))
    document = torch.full_like(places.row_of, -1)  # positions without a row are in none
    document[places.window, places.position] = side["document"]
    within = (age >= 0) & (place[:, None] // length == place // length)
    within = within & (document[:, :, None] == document[:, None, :]) & (document >= 0)[:, :, None]
    decay = torch.where(within, mixing * (1.0 - mixing) ** age.clamp_min(0), 0.0).to(acts_BF.dtype)
    total, weight = decay @ places.spread(acts_BF), decay.sum(dim=2, keepdim=True)
    if start_F is not None:
        fading = ((1.0 - mixing) ** within.sum(dim=2, keepdim=True)).to(acts_BF.dtype)
        total, weight = total + fading * start_F, weight + fading
    return places.collect(total / weight.clamp_min(TINY))


def gradient_ratio(view: View, loss: Tensor) -> Tensor:
    """Norm of reconstruction's gradient over that of the loss, both for non-zero codes; without gradient."""
    (own,) = torch.autograd.grad(loss, view.codes.values, retain_graph=True)
    ratio = (_reconstruction_square(view) / _global_square(view, own).clamp_min(TINY)).sqrt()
    return ratio.clamp_max(MAX_RATIO)


@once
@torch.no_grad()
def _reconstruction_square(view: View) -> Tensor:
    """Squared norm of the gradient of the share of variance unexplained."""
    scale = 2.0 / (view.x.shape[0] * view.stats.variance)
    zero = view.sae.b_enc.new_zeros(view.sae.num_latents)
    gradient = affine(view.residual, None, view.sae.W_dec, zero, view.codes.support)
    return _global_square(view, scale * gradient)


def _global_square(view: View, gradient: Tensor) -> Tensor:
    """Squared norm, over all ranks, of a gradient for the codes, each rank's part scaled by its weight."""
    ranks = view.side.ranks
    shared = torch.where(view.codes.values != 0, ranks.weight / ranks.size * gradient, 0.0)
    return ranks.sum(shared.square().sum())
