"""Gates: from pre-activations to activations.

A gate does three things. `choose` picks the support of a training batch from dense pre-activations,
without gradient. `open` turns the pre-activations at that support into activations, with gradient.
`infer` is what the saved SAE computes: dense, row by row, without the batch. B rows, F latents.

The straight-through derivatives of a learned threshold (Rajamanoharan et al. 2024, JumpReLU): there is a rectangular
window of width `bandwidth` around theta. jump(z, theta) = z where z > theta, else 0; inside the window its derivative
by theta is -theta / bandwidth. heaviside(z, theta) = 1 where z > theta, else 0; inside the window its derivative by
theta is -1 / bandwidth. Neither passes the window's gradient on to z.
"""

# pyright: reportIncompatibleMethodOverride=false
# (`once_differentiable` makes ctx positional, which the stub of Function.backward does not foresee)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .kernels.codes import Codes
from .kernels.select_top_k import marked, support_of_batch, support_topk, topk_batch
from .kernels.sparse_support import Support, support_from_flat
from .side_inputs import Side
from .top_k_over_processes import lowest_of_batch, split_batch, split_topk

FLOOR = 1e-4
DENSE_SHARE = 0.06  # above this share of active entries the dense products are faster (measured)


class Gate(nn.Module):
    """Base class of gates."""

    can_lower = True
    """Whether lower pre-activations mean smaller activations; false if activations have signs."""
    may_split = False
    """Whether its latents may be split over processes; its parameters then have one number for each latent."""
    keeps_number = False
    """Whether it opens a fixed number of latents, whatever the size of pre-activations."""

    def choose(self, pre: Tensor, side: Side) -> Support | None:
        raise NotImplementedError

    def open(self, pre: Codes, b_enc: Tensor, side: Side) -> Codes:
        return pre.map(torch.relu)

    def infer(self, pre: Tensor, b_enc: Tensor) -> Tensor:
        raise NotImplementedError

    def observe(self, codes: Codes, side: Side) -> None:
        """Update running statistics after a step; most gates have none."""

    def lower(self, amount: float) -> None:
        """Adapt the gate's own offsets to pre-activations that were lowered by this much."""

    def rescale(self, factor: float) -> None:
        """Adapt the gate's own offsets to pre-activations that were multiplied by this factor."""


class Relu(Gate):
    """max(pre, 0)."""

    may_split = True

    def choose(self, pre: Tensor, side: Side) -> Support | None:
        return marked(pre > 0, DENSE_SHARE)

    def infer(self, pre: Tensor, b_enc: Tensor) -> Tensor:
        return pre.relu()


class AnnealedRelu(Relu):
    """max(pre, 0), with the running coefficient of a penalty whose exponent p changes.

    When p changes after a step, the coefficient is set to give the same penalty on that batch.
    """

    penalty_scale: Tensor

    def __init__(self, unit: float) -> None:
        super().__init__()
        self.unit = unit
        self.register_buffer("penalty_scale", torch.ones(()))

    def powers(self, codes: Codes, p: float) -> Tensor:
        """Mean over rows of the sum of (activation / unit)^p over active latents."""
        active = torch.where(codes.values > 0, codes.values / self.unit, 1.0)
        # The derivative of x^p is unbounded at zero; activations below FLOOR count linearly.
        powers = torch.where(active > FLOOR, active.clamp_min(FLOOR) ** p, active * FLOOR ** (p - 1.0))
        return torch.where(codes.values > 0, powers, 0.0).sum() / codes.num_rows

    @torch.no_grad()
    def observe(self, codes: Codes, side: Side) -> None:
        p, next_p = side.knob("p", 1.0), side.knob("next_p", 1.0)
        if p != next_p:
            old, new = (side.latents.sum(side.ranks.mean(self.powers(codes, power))) for power in (p, next_p))
            self.penalty_scale *= torch.where(new > 0, old / new.clamp_min(1e-30), 1.0)


class TopK(Gate):
    """The k largest pre-activations of each row, then relu."""

    may_split = True
    keeps_number = True

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def choose(self, pre: Tensor, side: Side) -> Support:
        return _largest_of_rows(pre, self.k, side)

    def infer(self, pre: Tensor, b_enc: Tensor) -> Tensor:
        values, latents = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, latents, values.relu())


class AbsTopK(Gate):
    """The k pre-activations of each row that are furthest from zero, with their signs."""

    can_lower = False
    may_split = True

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def choose(self, pre: Tensor, side: Side) -> Support:
        return _largest_of_rows(pre.abs(), self.k, side)

    def open(self, pre: Codes, b_enc: Tensor, side: Side) -> Codes:
        return pre

    def infer(self, pre: Tensor, b_enc: Tensor) -> Tensor:
        latents = pre.abs().topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(pre).scatter_(-1, latents, pre.gather(-1, latents))


class BatchTopK(Gate):
    """The k B largest of a batch of B rows; at inference all above a threshold learned during training.

    The threshold is the running mean of the smallest activation that the batch kept.
    """

    may_split = True
    keeps_number = True
    threshold: Tensor
    threshold_steps: Tensor

    def __init__(self, k: float, threshold_decay: float = 0.99) -> None:
        super().__init__()
        self.k = k
        self.threshold_decay = threshold_decay
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_steps", torch.zeros((), dtype=torch.int64))

    def choose(self, pre: Tensor, side: Side) -> Support:
        # One rank may hold all of the largest entries, so each offers `count` candidates.
        count = round(self.k * side.ranks.rows(pre.shape[0]))
        if not side.latents.is_whole:
            return split_batch(pre, count, side.latents)
        if side.ranks.size == 1:
            return support_of_batch(pre, min(count, pre.numel()))
        flat = _keep_globally(pre, topk_batch(pre, min(count, pre.numel())), count, side)
        return support_from_flat(flat, pre.shape[0], pre.shape[1])

    def infer(self, pre: Tensor, b_enc: Tensor) -> Tensor:
        return _above(pre, self.threshold)

    @torch.no_grad()
    def observe(self, codes: Codes, side: Side) -> None:
        values = codes.values.detach()
        smallest = torch.where(values > 0, values, torch.inf).amin() if values.numel() else values.new_tensor(torch.inf)
        smallest = torch.cat(side.latents.gather(smallest.reshape(1))[0]).amin()
        smallest = torch.cat(side.ranks.gather(smallest.reshape(1))).amin()
        is_any = torch.isfinite(smallest)  # whether the batch kept an entry; never read on the host
        self.threshold_steps += is_any
        weight = self.threshold_steps.double().clamp_min(1).reciprocal().clamp_min(1.0 - self.threshold_decay).float()
        moved = self.threshold + weight * (smallest - self.threshold)
        self.threshold.copy_(torch.where(is_any, moved, self.threshold))


class JumpRelu(Gate):
    """pre where pre > threshold, else 0; the threshold is trained through straight-through windows.

    Threshold and bandwidth are given, and the threshold trained, in multiples of `unit`. `asked_l0` is the number of
    active latents per row at a fitted start.
    """

    may_split = True

    def __init__(
        self, num_latents: int, threshold: float, bandwidth: float, unit: float = 1.0, asked_l0: float | None = None
    ) -> None:
        super().__init__()
        self.asked_l0 = asked_l0
        self.raw_threshold = nn.Parameter(torch.full((num_latents,), threshold))
        self.bandwidth = bandwidth
        self.unit = unit

    @property
    def threshold(self) -> Tensor:
        return self.raw_threshold * self.unit

    def choose(self, pre: Tensor, side: Side) -> Support | None:
        # Entries just below the threshold have a derivative too, so they belong to the support.
        lowest = self.threshold.detach() - 0.5 * self._window
        return marked(pre > lowest, DENSE_SHARE)

    def open(self, pre: Codes, b_enc: Tensor, side: Side) -> Codes:
        theta = pre.per_latent(self.threshold)
        return pre.with_values(_Jump.apply(pre.values, theta, self._window))

    def place(self, threshold: float) -> None:
        """Set one threshold for all latents."""
        self.raw_threshold.fill_(threshold / self.unit)

    def lower(self, amount: float) -> None:
        self.raw_threshold.sub_(amount / self.unit)

    def rescale(self, factor: float) -> None:
        self.raw_threshold.mul_(factor)

    def marks(self, codes: Codes) -> Tensor:
        """1 where an entry is active, with straight-through gradient to the threshold."""
        assert codes.pre is not None
        return _Heaviside.apply(codes.pre, codes.per_latent(self.threshold), self._window)

    def infer(self, pre: Tensor, b_enc: Tensor) -> Tensor:
        return _above(pre, self.threshold)

    @property
    def _window(self) -> float:
        return self.bandwidth * self.unit


class Gated(Gate):
    """The gate pre > 0 decides whether a latent fires, a rescaled magnitude how strongly.

    The encoder bias belongs to the gate; the magnitude shares the encoder's directions.
    """

    may_split = True

    def __init__(self, num_latents: int) -> None:
        super().__init__()
        self.r_mag = nn.Parameter(torch.zeros(num_latents))
        self.b_mag = nn.Parameter(torch.zeros(num_latents))

    def lower(self, amount: float) -> None:
        self.b_mag.sub_(amount)

    def rescale(self, factor: float) -> None:
        self.b_mag.mul_(factor)

    def choose(self, pre: Tensor, side: Side) -> Support | None:
        return marked(pre > 0, DENSE_SHARE)

    def open(self, pre: Codes, b_enc: Tensor, side: Side) -> Codes:
        projected = pre.values - pre.per_latent(b_enc)
        magnitude = projected * pre.per_latent(self.r_mag.exp()) + pre.per_latent(self.b_mag)
        return pre.with_values(torch.where(pre.values > 0, magnitude.relu(), 0.0))

    def infer(self, pre: Tensor, b_enc: Tensor) -> Tensor:
        magnitude = (pre - b_enc) * self.r_mag.exp() + self.b_mag
        return torch.where(pre > 0, magnitude.relu(), 0.0)


def _above(pre: Tensor, threshold: Tensor) -> Tensor:
    """Activations above a threshold, one for all latents or one for each."""
    return torch.where(pre > threshold, pre, 0.0).relu()


def _largest_of_rows(score: Tensor, k: int, side: Side) -> Support:
    """The k largest of each row; if latents are split, this process's part of them."""
    if side.latents.is_whole:
        return support_topk(score, min(score.shape[1], k))
    return split_topk(score, min(side.latents.total, k), side.latents)


def _keep_globally(pre: Tensor, flat: Tensor, count: int, side: Side) -> Tensor:
    """This rank's candidates that are among the `count` largest of all ranks.

    Among equals, of which a product in bfloat16 has many, earlier ranks come first, then earlier places.
    """
    own = pre.view(-1)[flat].float()
    found = lowest_of_batch(own, count, side.ranks.sum)
    if found is None:
        return flat
    lowest, wanted = found
    tied = own == lowest
    before = sum(side.ranks.gather(tied.sum()[None])[: side.ranks.rank])
    return flat[(own > lowest) | (tied & (tied.cumsum(0) <= wanted - before))]


PLAIN_GATES = frozenset({Relu, AnnealedRelu, TopK, AbsTopK, BatchTopK, JumpRelu, Gated})
"""Gates that the plain formats of saved SAEs support; others are saved with their variant."""


def is_plain(gate: Gate) -> bool:
    """Whether a plain format can save it: a subclass that keeps `infer` differs only in training."""
    return any(kind in PLAIN_GATES and type(gate).infer is kind.infer for kind in type(gate).__mro__)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return torch.where(z > theta, z, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, theta = ctx.saved_tensors
        grad_theta = torch.where(_in_window(z, theta, ctx.bandwidth), grad * theta, 0.0) / -ctx.bandwidth
        return torch.where(z > theta, grad, 0.0), grad_theta.sum_to_size(theta.shape), None


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return (z > theta).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        z, theta = ctx.saved_tensors
        grad_theta = torch.where(_in_window(z, theta, ctx.bandwidth), grad, 0.0) / -ctx.bandwidth
        return None, grad_theta.sum_to_size(theta.shape), None


def _in_window(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    return (z - theta).abs() < 0.5 * bandwidth
