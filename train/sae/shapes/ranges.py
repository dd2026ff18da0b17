"""Ranges of positions, and parts of a dictionary that belong to them.

T context, R ranges, F latents. Range r holds the positions r T / R to (r + 1) T / R.
"""

from __future__ import annotations

import torch
from torch import Tensor

FREE = -1  # the range of a latent that belongs to none


def range_of(position: Tensor, context: int, ranges: int) -> Tensor:
    """The range of each position."""
    return torch.div(position * ranges, context, rounding_mode="floor").clamp_(0, ranges - 1)


def spread_over_ranges(width: int, ranges: int, share: float) -> Tensor:
    """int64 [F]: the first `share` of the latents in equal runs over the ranges, the others free."""
    bound = round(share * width)
    latents = torch.arange(width)
    owner = torch.div(latents * ranges, max(bound, 1), rounding_mode="floor")
    return torch.where(latents < bound, owner, FREE)


def spread_over_positions(width: int, context: int, share: float) -> Tensor:
    """float32 [F]: centres of the first `share` of the latents, evenly over the window; the others' do not count."""
    bound = max(round(share * width), 1)
    return ((torch.arange(width) + 0.5) * context / bound).clamp_max(context - 1.0)
