"""The sparse products: bag sums, pair dots and segment sums.

B rows, D width, F latents, N entries. A bag sum gives each bag and block of columns to one program, which adds
its entries in order. Pair dots take a fixed number of entries per program, whatever bag they are in, so
a latent that fires in every row does not hold up the rest.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 512  # per program: four loads of 16 bytes in each thread of a warp
ENTRIES = 16  # per program of pair dots
TOGETHER = 4  # rows that a program loads at once


@triton.jit
def _bag_sum(table, indices, offsets, weights, out, D, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr):
    """out[bag] = sum of weights[n] * table[indices[n]] over the bag's entries."""
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    entry = tl.load(offsets + bag)
    stop = tl.load(offsets + bag + 1)
    total = tl.zeros((COLUMNS,), tl.float32)
    while entry < stop:
        entries = entry + tl.arange(0, TOGETHER)
        valid = entries < stop
        index = tl.load(indices + entries, mask=valid, other=0).to(tl.int64)
        weight = tl.load(weights + entries, mask=valid, other=0.0)
        rows = tl.load(table + index[:, None] * D + columns[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        total += tl.sum(rows.to(tl.float32) * weight[:, None], axis=0)
        entry += TOGETHER
    tl.store(out + bag * D + columns, total, mask=inside)


def bag_sum(table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """out[r] = sum of weights[n] * table[indices[n]] over offsets[r] <= n < offsets[r + 1]: float32 [bags, D]."""
    bags, width = offsets.numel() - 1, table.shape[1]
    out = torch.empty(bags, width, dtype=torch.float32, device=table.device)
    grid = (bags, triton.cdiv(width, COLUMNS))
    _bag_sum[grid](table, indices, offsets, weights, out, width, COLUMNS=COLUMNS, TOGETHER=TOGETHER, num_warps=4)
    return out


@triton.jit
def _pair_dots(
    left, left_index, right, right_index, order, out, N, D: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[order[n]] = <left[left_index[n]], right[right_index[n]]>."""
    entries = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    valid = entries < N
    left_row = tl.load(left_index + entries, mask=valid, other=0).to(tl.int64)
    right_row = tl.load(right_index + entries, mask=valid, other=0).to(tl.int64)
    total = tl.zeros((ENTRIES, COLUMNS), tl.float32)
    for start in range(0, D, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        both = valid[:, None] & (columns < D)[None, :]
        a = tl.load(left + left_row[:, None] * D + columns[None, :], mask=both, other=0.0)
        b = tl.load(right + right_row[:, None] * D + columns[None, :], mask=both, other=0.0)
        total += a.to(tl.float32) * b.to(tl.float32)
    place = tl.load(order + entries, mask=valid, other=0)
    tl.store(out + place, tl.sum(total, axis=1), mask=valid)


def pair_dots(left: Tensor, left_index: Tensor, right: Tensor, right_index: Tensor, order: Tensor) -> Tensor:
    """out[order[n]] = <left[left_index[n]], right[right_index[n]]>: float32 [N].

    Adjacent entries should share rows of the larger table, which are then read from memory once.
    """
    count, width = left_index.numel(), left.shape[1]
    out = torch.empty(count, dtype=torch.float32, device=left.device)
    columns = min(128, triton.next_power_of_2(width))
    _pair_dots[(triton.cdiv(count, ENTRIES),)](
        left, left_index, right, right_index, order, out, count, D=width, ENTRIES=ENTRIES, COLUMNS=columns, num_warps=4
    )
    return out


@triton.jit
def _segment_sum(values, offsets, out, BLOCK: tl.constexpr):
    """out[segment] = the sum of its values, block by block."""
    segment = tl.program_id(0)
    entry = tl.load(offsets + segment)
    stop = tl.load(offsets + segment + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    while entry < stop:
        entries = entry + tl.arange(0, BLOCK)
        total += tl.load(values + entries, mask=entries < stop, other=0.0)
        entry += BLOCK
    tl.store(out + segment, tl.sum(total))


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the values of each segment: float32 [segments]."""
    segments = offsets.numel() - 1
    out = torch.empty(segments, dtype=torch.float32, device=values.device)
    _segment_sum[(segments,)](values, offsets, out, BLOCK=128, num_warps=1)
    return out
