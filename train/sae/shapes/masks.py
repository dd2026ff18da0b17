"""Factors of activations: masks, which limit where in a window a latent may fire, and gates.

p position, T context, F latents, c coefficient, R ranges; range r holds the positions r T / R to (r + 1) T / R. The
mask m_f(p) of a latent is
- hard: 1 inside its range of positions, 0 outside;
- soft: exp(-(p - mu_f)^2 / (2 sigma^2)) with a learned centre mu_f; 0 below a cutoff, because a Gaussian's tails would
  count as activity everywhere without meaning anything;
- free: 1 everywhere.
A latent's activation is multiplied by 1 + c (m - 1). c is 1, or goes from exactly 0 to exactly 1 over a part of the run
(progressive), optionally shifted along its sigmoid by a learned offset. Where the factor is 0 no gradient passes: a
latent is trained only inside its mask.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..kernels.codes import Codes
from ..kernels.hardware import numbers
from ..kernels.sparse_products_with_gradients import affine, rows_of
from ..side_inputs import Side
from .shaped_sae import Shape

FREE = -1  # the range of a latent without one
MaskKind = Literal["none", "hard", "soft", "static_slicing"]
COEFFICIENT = "mask_coefficient"


class Mask(Shape):
    """Base of hard and soft masks: the coefficient, and free latents."""

    needs_side = ("position",)
    has_factor = True
    bound: Tensor

    def __init__(self, bound_F: Tensor, learns_offset: bool) -> None:
        super().__init__()
        self.register_buffer("bound", bound_F.clone())
        self.offset = nn.Parameter(torch.zeros(())) if learns_offset else None

    def factor(self, codes: Codes, side: Side, latents: Tensor | None = None) -> Tensor:
        mask = self.mask(codes, self.position(side), latents)
        bound = codes.per_latent(_select(self.bound.to(mask.dtype), latents))
        return 1.0 + self.coefficient(side) * bound * (mask - 1.0)

    def coefficient(self, side: Side) -> Tensor | float:
        """c at this step."""
        c = side.knob(COEFFICIENT, 1.0)
        if self.offset is None:
            return c
        odds = c * self.offset.exp()
        return odds / (odds + (1.0 - c))  # exactly 1 at c = 1, however small the odds

    def mask(self, codes: Codes, position_B: Tensor, latents: Tensor | None) -> Tensor:
        raise NotImplementedError


class HardMask(Mask):
    """1 inside the latent's range, 0 outside."""

    range: Tensor
    num_ranges: Tensor

    def __init__(self, range_F: Tensor, context: int, ranges: int, learns_offset: bool = False) -> None:
        super().__init__(range_F != FREE, learns_offset)
        self.context, self.ranges = context, ranges
        self.register_buffer("range", range_F.clone())
        self.register_buffer("num_ranges", torch.tensor(ranges))

    def mask(self, codes: Codes, position_B: Tensor, latents: Tensor | None) -> Tensor:
        here = range_of(position_B, self.context, self.ranges).float()
        own = codes.per_latent(_select(self.range.float(), latents))
        return (codes.per_row(here) == own).float()


class SoftMask(Mask):
    """A Gaussian around a learned centre."""

    sigma: Tensor
    unscaled = ("offset",)

    def __init__(
        self, bound_F: Tensor, centre_F: Tensor, sigma: float, cutoff: float, learns_offset: bool = False
    ) -> None:
        super().__init__(bound_F, learns_offset)
        self.cutoff = cutoff
        self.centre = nn.Parameter(centre_F.clone())
        self.register_buffer("sigma", torch.tensor(sigma))
        self.lr_scale = 30.0 * sigma  # centres must move by order sigma

    def mask(self, codes: Codes, position_B: Tensor, latents: Tensor | None) -> Tensor:
        position = position_B.to(self.centre.dtype)
        distance = codes.per_row(position) - codes.per_latent(_select(self.centre, latents))
        height = torch.exp(-0.5 * (distance / self.sigma).square())
        return torch.where(height >= self.cutoff, height, 0.0)


class PositionGate(Shape):
    """Activations times 2 sigmoid(a_f + u_f . e(p)), of rank r in latents and positions.

    u and a start at zero, so every factor starts at exactly 1 and the SAE equal to its base; without the 2, activations
    would start at half their size.
    """

    needs_side = ("position",)
    has_factor = True

    def __init__(self, num_latents: int, context: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(num_latents))
        self.u = nn.Parameter(torch.zeros(num_latents, rank))
        self.e = nn.Parameter(torch.randn(context, rank, generator=generator))

    def factor(self, codes: Codes, side: Side, latents: Tensor | None = None) -> Tensor:
        a, u = _select(self.a, latents), _select(self.u, latents)
        return 2.0 * affine(rows_of(self.e, side["position"]), None, u, a, codes.support).sigmoid()


class TierGates(Shape):
    """The gates of a curriculum: one factor for all latents of a tier, from the tier's knob. Latents of a tier that is
    still off stay silent; in the end all factors are 1."""

    is_plain = True
    has_factor = True
    tier: Tensor

    def __init__(self, tier_F: Tensor, knobs: tuple[str, ...]) -> None:
        super().__init__()
        self.knobs = knobs
        self.register_buffer("tier", tier_F.clone())

    def factor(self, codes: Codes, side: Side, latents: Tensor | None = None) -> Tensor:
        on_T = numbers([side.knob(name, 1.0) for name in self.knobs], codes.values)
        return codes.per_latent(on_T[_select(self.tier, latents)])

    def follow(self, membership_F: Tensor) -> None:
        self.tier.copy_(membership_F)


def _select(table_F: Tensor, latents: Tensor | None) -> Tensor:
    return table_F if latents is None else table_F[latents]


def range_of(position: Tensor, context: int, ranges: int) -> Tensor:
    """The range of each position."""
    return torch.div(position * ranges, context, rounding_mode="floor").clamp_(0, ranges - 1)


def spread_over_ranges(width: int, ranges: int, share: float) -> Tensor:
    """int64 [F]: the first `share` of the latents divided equally among the ranges, the others free."""
    bound = round(share * width)
    latents = torch.arange(width)
    owner = torch.div(latents * ranges, max(bound, 1), rounding_mode="floor")
    return torch.where(latents < bound, owner, FREE)


def spread_over_positions(width: int, context: int, share: float) -> Tensor:
    """float32 [F]: centres of the first `share` of the latents, spaced evenly over the window; the rest is unused."""
    bound = max(round(share * width), 1)
    return ((torch.arange(width) + 0.5) * context / bound).clamp_max(context - 1.0)
