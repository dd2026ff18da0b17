"""Products x W^T + b of which only the largest entries are wanted: all in bfloat16, then those few in float32.

bfloat16 has half the bytes and, where the processor multiplies it, about twice the rate. How wrong such a product may
be is bounded by the lengths of what rounding took from each row (Cauchy and Schwarz), so whoever is passed over at the
first look is surely not wanted. Positive numbers sort as their bits do as integers, which are compared faster; a row
of which the bound says nothing is looked at again as a whole. No gradient. N rows, D width, F latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .hardware import has_fast_bfloat16
from .linear import linear
from .products import sampled_dots
from .select_latents import topk_rows
from .sparse_support import Support, support_from_flat

GROUP = 32  # latents of a group, of which the first look keeps the largest
SUMMED = 2**-22  # what an addition in float32 may take from a number, at both looks and more
EVERYTHING = -(1 << 15)  # a bound in bits that all pass


@dataclass(frozen=True, eq=False)
class Affine:
    """W and b with their bfloat16 copies, and the lengths that the bound is made of."""

    W: Tensor  # [F, D]
    b: Tensor  # [F]
    rounded: Tensor
    rounded_bias: Tensor
    longest: Tensor  # row of W or its copy
    lost: Tensor  # the most that the copy of a row lost
    lost_bias: Tensor  # the most that rounding and adding take from a bias

    @staticmethod
    def of(W: Tensor, b: Tensor) -> Affine:
        rounded, rounded_bias = W.to(torch.bfloat16), b.to(torch.bfloat16)
        longest, lost = W.norm(dim=1).amax(), (W - rounded).norm(dim=1).amax()
        lost_bias = ((b - rounded_bias).abs() + b.abs() * SUMMED).amax()
        return Affine(W, b, rounded, rounded_bias, longest + lost, lost, lost_bias)

    def look(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Coarse products [N, F], and the most that those of a row were wrong by before they became bfloat16."""
        low_x = x_ND.to(torch.bfloat16)
        length, width = x_ND.norm(dim=1), x_ND.shape[1]
        wrong = (x_ND - low_x).norm(dim=1) * self.longest + length * self.lost + self.lost_bias
        wrong += width * SUMMED * length * self.longest
        return linear(low_x, self.rounded, self.rounded_bias), wrong * (1 + 2**-8)

    def look_again(self, x_ND: Tensor, support: Support) -> Tensor:
        """float32 [entries of the support]."""
        return sampled_dots(support.offsets, support.latents, x_ND, self.W).add_(self.b[support.latents])


def can_look_twice(x_ND: Tensor, W_FD: Tensor) -> bool:
    """Whether the processor is faster in bfloat16; a GPU is not waited for."""
    is_plain = x_ND.dtype == W_FD.dtype == torch.float32 and x_ND.device.type == W_FD.device.type == "cpu"
    return is_plain and x_ND.numel() > 0 and has_fast_bfloat16("cpu")


def largest_products(affine: Affine, x_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and latents [N, k] of the k largest products of each row, in no particular order.

    At least k groups reach the k-th largest of the groups' maxima, and so do k entries: whatever is below it by more
    than both may be wrong is not among the k largest.
    """
    groups, rest = divmod(len(affine.W), GROUP)
    if rest or groups < 4 * k or not can_look_twice(x_ND, affine.W):
        return topk_rows(linear(x_ND, affine.W, affine.b), k)
    coarse, wrong = affine.look(x_ND)
    most = coarse.view(torch.int16).view(-1, GROUP, groups).amax(1).numpy()
    reached = torch.from_numpy(np.partition(most, groups - k)[:, groups - k]).view(torch.bfloat16).float()
    support = entries_above(coarse, (reached - 2 * wrong)[:, None])
    values, counts = affine.look_again(x_ND, support), support.offsets.diff()
    place = torch.arange(int(counts.amax()))
    entry = (support.offsets[:-1, None] + place).clamp_max(len(values) - 1)
    found = torch.where(place < counts[:, None], values[entry], -torch.inf)
    best, chosen = found.topk(k, dim=1, sorted=False)
    return best, support.latents[entry.gather(1, chosen)]


def products_above(affine: Affine, x_ND: Tensor, floor_F: Tensor, most_share: float) -> tuple[Tensor, Support] | None:
    """The products that are above a floor, one for each latent, with a few that are not; None where they are many."""
    coarse, wrong = affine.look(x_ND)
    lowest = floor_F - wrong.amax()
    if not bool((lowest > 0).all()):
        return None
    support = entries_above(coarse, lowest[None])
    if len(support.latents) > most_share * coarse.numel():
        return None
    return affine.look_again(x_ND, support), support


def entries_above(coarse: Tensor, lowest: Tensor) -> Support:
    """Where coarse products may stand for more than this; everywhere in rows or columns where that is not positive.

    The bound is cut off to bfloat16: that makes up for the half step by which what it comes from was rounded up.
    """
    bits = (lowest.view(torch.int32) >> 16).to(torch.int16)
    bound = torch.where(lowest > 0, bits, EVERYTHING).numpy()
    flat = np.flatnonzero(coarse.view(torch.int16).numpy() >= bound)
    return support_from_flat(torch.from_numpy(flat), *coarse.shape)
