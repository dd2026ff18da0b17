"""Which latents are active for which row of a batch, in compressed-row form.

B rows (tokens), F latents, N entries. Row b owns entries offsets[b] to offsets[b + 1]. Indices are
int32, the type of the fast CPU paths. Weight gradients need the transposed support (latents as rows),
which is computed once, when first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

FEW = 16  # up to this many sums a GPU computes by one reduction each


@dataclass(frozen=True, eq=False)
class Support:
    """N active (row, latent) pairs."""

    offsets: Tensor  # int32 [B + 1]
    latents: Tensor  # int32 [N]
    num_latents: int

    @property
    def num_rows(self) -> int:
        return self.offsets.numel() - 1

    @cached_property
    def rows(self) -> Tensor:
        """int32 [N], the row of each entry."""
        rows = torch.arange(self.num_rows, dtype=torch.int32, device=self.offsets.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=self.latents.numel())

    @property
    def flat(self) -> Tensor:
        """int64 [N], the place of each entry in a row-major [rows, num_latents] table."""
        return self.rows.long() * self.num_latents + self.latents

    @cached_property
    def by_latent(self) -> Transposed:
        """The same pairs ordered by latent, then by row."""
        latents, order = torch.sort(self.latents, stable=True)
        return Transposed(group_offsets(latents, self.num_latents), self.rows[order], latents, order)


@dataclass(frozen=True, eq=False)
class Transposed:
    """A support read latent by latent."""

    offsets: Tensor  # int32 [F + 1]
    rows: Tensor  # int32 [N]
    latents: Tensor  # int32 [N], ascending
    order: Tensor  # int64 [N], the place of each of these entries in the support


def support_from_topk(latents: Tensor, num_latents: int) -> Support:
    """Support of `latents` [B, k], the same number of entries in every row."""
    rows, k = latents.shape
    offsets = torch.arange(0, rows * k + 1, k, dtype=torch.int32, device=latents.device)
    return Support(offsets, latents.reshape(-1).to(torch.int32), num_latents)


def support_from_flat(flat: Tensor, rows: int, num_latents: int) -> Support:
    """Support of increasing positions `flat` int64 [N] in a row-major [rows, num_latents] table."""
    row = torch.div(flat, num_latents, rounding_mode="floor")
    latents = (flat - row * num_latents).to(torch.int32)
    return Support(starts(torch.bincount(row, minlength=rows)), latents, num_latents)


def group_offsets(groups: Tensor, num_groups: int) -> Tensor:
    """int32 [num_groups + 1], where each group starts among ascending group numbers [N]."""
    # By search: for a histogram the host would wait for a GPU.
    bounds = torch.arange(num_groups + 1, dtype=groups.dtype, device=groups.device)
    return torch.searchsorted(groups, bounds, out_int32=True)


def starts(counts: Tensor) -> Tensor:
    """int32 [groups + 1], where each group starts, from the sizes of the groups."""
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
    return starts


def group_of_each(sizes: Sequence[int]) -> Tensor:
    """int64, the group of each latent where groups of these sizes follow one another."""
    # The total is known, so this works without values too.
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(tuple(sizes)), output_size=sum(sizes))


def index_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """out[index[n]] += values[n]: [size, ...]; differentiable, and the same bits each time on every device."""
    out = values.new_zeros(size, *values.shape[1:])
    if values.device.type == "cpu":
        return out.index_add(0, index, values)
    if values.ndim == 1 and size <= FEW:
        return sum_few(values, index, size)
    return out.index_put((index,), values, accumulate=True)  # atomics would vary the order of addition; this sorts


def sum_few(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Same as `index_sum`, by one reduction per sum: after a GPU's sort a single warp would add each sum's entries."""
    return torch.where(index == torch.arange(size, device=index.device)[:, None], values, values.new_zeros(())).sum(1)
