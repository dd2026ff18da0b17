"""Products x W^T + b of which only the largest entries are wanted: all in bfloat16, then those few in float32.

bfloat16 has half the bytes and, where the processor multiplies it, about twice the rate. How wrong such a product may
be is bounded by the lengths of what rounding took from each row (Cauchy and Schwarz), so whoever is passed over at the
first look is not wanted, for finite numbers whose squares are too. Positive numbers sort as their bits do as integers,
which are compared faster. Rows of which the bound says nothing are looked at as a whole. No gradient.

N rows, D width, F latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .dense_products import linear, linear_packed, packed
from .hardware import has_fast_bfloat16
from .select_top_k import best_of, has_groups, largest_of_rows, marked, most_of_groups, topk_rows
from .sparse_products import sampled_dots
from .sparse_support import Support, support_from_flat

KEPT = 1 - 2**-8  # of a positive number, at the least, when it becomes bfloat16
SUMMED = 2**-22  # the most that an addition in float32 takes from a number is a quarter of it, and there are two looks
NOTHING = np.int16((1 << 15) - 1)  # a bound that no number passes
USUAL = 2.0  # times the median of rows: what is further off is looked at as a whole


@dataclass(frozen=True, eq=False)
class Affine:
    """W [F, D] and b [F]; where they are asked for, their bfloat16 copies and the lengths that the bound is made of."""

    W: Tensor
    b: Tensor

    @cached_property
    def rounded(self) -> tuple[Tensor, Tensor]:
        return packed(self.W.to(torch.bfloat16)), self.b.to(torch.bfloat16)

    @cached_property
    def longest(self) -> Tensor:
        """A row of W, or of its copy."""
        return self.W.norm(dim=1).amax() + self.lost

    @cached_property
    def lost(self) -> Tensor:
        """The most that a row of W lost."""
        return (self.W - self.W.to(torch.bfloat16)).norm(dim=1).amax()

    @cached_property
    def lost_bias(self) -> Tensor:
        """The most that rounding and adding take from a bias."""
        return ((self.b - self.rounded[1]).abs() + self.b.abs() * SUMMED).amax()

    def bound(self, x_ND: Tensor) -> Tensor:
        """[N], the most that coarse products of a row are wrong by before they become bfloat16."""
        length, rounded = x_ND.norm(dim=1), (x_ND - x_ND.to(torch.bfloat16)).norm(dim=1)
        wrong = rounded * self.longest + length * self.lost + self.lost_bias
        return (wrong + x_ND.shape[1] * SUMMED * length * self.longest) * (1 + 2**-8)

    def look(self, x_ND: Tensor) -> Tensor:
        """Coarse products, bfloat16 [N, F]."""
        return linear_packed(x_ND.to(torch.bfloat16), *self.rounded)

    def look_again(self, x_ND: Tensor, support: Support) -> Tensor:
        """float32 at the entries of the support, whose rows have no need to be sorted by latent for it."""
        return sampled_dots(support.offsets, support.latents, x_ND, self.W).add_(self.b[support.latents])


def can_look_twice(x_ND: Tensor, W_FD: Tensor) -> bool:
    """Whether the processor is faster in bfloat16; a GPU is not waited for."""
    is_plain = x_ND.dtype == W_FD.dtype == torch.float32 and x_ND.device.type == W_FD.device.type == "cpu"
    return is_plain and x_ND.numel() > 0 and has_fast_bfloat16("cpu")


def largest_products(affine: Affine, x_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and latents [N, k] of the k largest products of each row, in no particular order."""
    if not has_groups(len(affine.W), k) or not can_look_twice(x_ND, affine.W):
        return largest_of_rows(linear(x_ND, affine.W, affine.b), k)
    coarse = affine.look(x_ND).view(torch.int16)
    reached = torch.from_numpy(most_of_groups(coarse, k)[:, 0].copy()).view(torch.bfloat16).float()
    lowest = lowest_beside(reached, affine.bound(x_ND))
    known = lowest > 0
    if not bool(known.any()):
        return topk_rows(linear(x_ND, affine.W, affine.b), k)
    bound = np.where(known.numpy(), bits(lowest), NOTHING)
    flat = torch.from_numpy(np.flatnonzero(coarse.numpy() >= bound[:, None]))
    support = support_from_flat(flat, *coarse.shape)
    values, latents = best_of(support, affine.look_again(x_ND, support), k)
    if not bool(known.all()):
        values[~known], latents[~known] = topk_rows(linear(x_ND[~known], affine.W, affine.b), k)
    return values, latents


def products_above(affine: Affine, x_ND: Tensor, floor_F: Tensor, most_share: float) -> tuple[Tensor, Support] | None:
    """The products that are above a floor, one for each latent, with a few that are not; None where they are many."""
    wrong = affine.bound(x_ND)
    usual = wrong <= USUAL * wrong.median()
    lowest = floor_F - wrong.where(usual, 0).amax()
    if not bool((lowest > 0).all()):
        return None
    is_near = affine.look(x_ND).view(torch.int16).numpy() >= bits(lowest)
    is_near[~usual.numpy()] = True
    support = marked(torch.from_numpy(is_near), most_share)
    return None if support is None else (affine.look_again(x_ND, support), support)


def lowest_beside(reached: Tensor, wrong: Tensor) -> Tensor:
    """The least that a coarse product was before it was rounded, if it may be as large as one that became `reached`."""
    return reached * KEPT - 2 * wrong


def bits(positive: Tensor) -> np.ndarray:
    """int16, those of the next bfloat16 that is not above: who is not below it is not when it is rounded either."""
    return (positive.view(torch.int32) >> 16).to(torch.int16).numpy()
