"""Products x W^T + b of which only the largest entries are needed: all in bfloat16, then those few in float32.

bfloat16 has half the bytes and, where the processor multiplies it, about twice the rate. The error of such a product is
bounded by the lengths of its rows' rounding errors (Cauchy-Schwarz), so entries that the first look skips are never
needed, provided that numbers and their squares are finite. Positive numbers sort like their bits as integers, which are
compared faster. Rows for which the bound is useless are computed as a whole. No gradient.

N rows, D width, F latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...train.sae.kernels.dense_products import linear, linear_packed, packed
from ...train.sae.kernels.hardware import has_fast_bfloat16
from ...train.sae.kernels.select_top_k import marked, topk_rows
from ...train.sae.kernels.sparse_products import sampled_dots
from ...train.sae.kernels.sparse_support import Support, support_from_flat

KEPT = 1 - 2**-8  # the least share of a positive number that remains when it becomes bfloat16
SUMMED = 2**-22  # an addition in float32 loses at most a quarter of this share of a number, and there are two looks
UNREACHABLE = np.int16((1 << 15) - 1)  # a bound that no number reaches
USUAL = 2.0  # times the median error: rows with a larger one are computed as a whole
GROUP = 32  # latents per group in `largest_of_rows`


@dataclass(frozen=True, eq=False)
class Affine:
    """W [F, D] and b [F], with their bfloat16 copies and the lengths for the bound, both computed on demand."""

    W: Tensor
    b: Tensor

    @cached_property
    def rounded(self) -> tuple[Tensor, Tensor]:
        return packed(self.W.to(torch.bfloat16)), self.b.to(torch.bfloat16)

    @cached_property
    def longest(self) -> Tensor:
        """Upper bound for the length of a row of W, or of its copy."""
        return self.W.norm(dim=1).amax() + self.lost

    @cached_property
    def lost(self) -> Tensor:
        """The largest rounding error of a row of W."""
        return (self.W - self.W.to(torch.bfloat16)).norm(dim=1).amax()

    @cached_property
    def lost_bias(self) -> Tensor:
        """The largest error of a bias from rounding and addition."""
        return ((self.b - self.rounded[1]).abs() + self.b.abs() * SUMMED).amax()

    def bound(self, x_ND: Tensor) -> Tensor:
        """[N], the largest error of a row's coarse products before they become bfloat16."""
        length, rounded = x_ND.norm(dim=1), (x_ND - x_ND.to(torch.bfloat16)).norm(dim=1)
        error = rounded * self.longest + length * self.lost + self.lost_bias
        return (error + x_ND.shape[1] * SUMMED * length * self.longest) * (1 + 2**-8)

    def look(self, x_ND: Tensor) -> Tensor:
        """Coarse products, bfloat16 [N, F]."""
        return linear_packed(x_ND.to(torch.bfloat16), *self.rounded)

    def look_again(self, x_ND: Tensor, support: Support) -> Tensor:
        """float32 at the entries of the support, whose rows need not be sorted by latent."""
        return sampled_dots(support.offsets, support.latents, x_ND, self.W).add_(self.b[support.latents])


def can_look_twice(x_ND: Tensor, W_FD: Tensor) -> bool:
    """Whether two looks are faster: on a CPU with fast bfloat16. On a GPU the host would have to wait in between."""
    is_plain = x_ND.dtype == W_FD.dtype == torch.float32 and x_ND.device.type == W_FD.device.type == "cpu"
    return is_plain and x_ND.numel() > 0 and has_fast_bfloat16("cpu")


def largest_products(affine: Affine, x_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and latents [N, k] of the k largest products of each row, in no particular order."""
    if not has_groups(len(affine.W), k) or not can_look_twice(x_ND, affine.W):
        return largest_of_rows(linear(x_ND, affine.W, affine.b), k)
    coarse = affine.look(x_ND).view(torch.int16)
    reached = torch.from_numpy(most_of_groups(coarse, k)[:, 0].copy()).view(torch.bfloat16).float()
    lowest = lowest_candidate(reached, affine.bound(x_ND))
    is_bounded = lowest > 0
    if not bool(is_bounded.any()):
        return topk_rows(linear(x_ND, affine.W, affine.b), k)
    bound = np.where(is_bounded.numpy(), bits(lowest), UNREACHABLE)
    flat = torch.from_numpy(np.flatnonzero(coarse.numpy() >= bound[:, None]))
    support = support_from_flat(flat, *coarse.shape)
    values, latents = best_of(support, affine.look_again(x_ND, support), k)
    if not bool(is_bounded.all()):
        whole = x_ND[~is_bounded]
        values[~is_bounded], latents[~is_bounded] = topk_rows(linear(whole, affine.W, affine.b), k)
    return values, latents


def largest_of_rows(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Same as `topk_rows`, with half the work but in one thread, for when other cores are busy."""
    rows, width = pre.shape
    if rows == 0 or not has_groups(width, k) or pre.device.type != "cpu" or pre.dtype != torch.float32:
        return topk_rows(pre, k)
    most = most_of_groups(pre, k)
    if np.isnan(most).any():  # NaN counts as the largest, and no comparison finds it
        return topk_rows(pre, k)
    flat = torch.from_numpy(np.flatnonzero(pre.numpy() >= most[:, :1]))
    return best_of(support_from_flat(flat, rows, width), pre.view(-1)[flat], k)


def has_groups(width: int, k: int) -> bool:
    """Whether a row can be divided into many more groups than k."""
    return width % GROUP == 0 and width // GROUP >= 4 * k


def most_of_groups(scores: Tensor, k: int) -> np.ndarray:
    """[B, k], the k largest group maxima, the smallest first: at least k entries of a row reach it, and few more."""
    groups = scores.shape[1] // GROUP
    return np.partition(scores.view(-1, GROUP, groups).amax(1).numpy(), groups - k)[:, groups - k :]


def best_of(support: Support, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and latents [B, k] of the k largest of each row's few entries; if there are fewer, values of -inf."""
    counts = support.offsets.diff()
    place = torch.arange(max(int(counts.amax()), k))
    entry = (support.offsets[:-1, None] + place).clamp_max(len(values) - 1)
    found = torch.where(place < counts[:, None], values[entry], -torch.inf)
    best, chosen = found.topk(k, dim=1, sorted=False)
    return best, support.latents[entry.gather(1, chosen)].long()


def products_above(affine: Affine, x_ND: Tensor, floor_F: Tensor, most_share: float) -> tuple[Tensor, Support] | None:
    """The products above each latent's floor, and a few others; None if there are too many."""
    error = affine.bound(x_ND)
    usual = error <= USUAL * error.median()
    lowest = floor_F - error.where(usual, 0).amax()
    if not bool((lowest > 0).all()):
        return None
    is_near = affine.look(x_ND).view(torch.int16).numpy() >= bits(lowest)
    is_near[~usual.numpy()] = True
    support = marked(torch.from_numpy(is_near), most_share)
    return None if support is None else (affine.look_again(x_ND, support), support)


def lowest_candidate(reached: Tensor, error: Tensor) -> Tensor:
    """The lowest coarse product, before rounding, that may in truth be as large as one that became `reached`."""
    return reached * KEPT - 2 * error


def bits(positive: Tensor) -> np.ndarray:
    """int16, the bits of the number rounded down to bfloat16: whatever is at or above it stays so when rounded."""
    return (positive.view(torch.int32) >> 16).to(torch.int16).numpy()
