"""The update of a weight table, row by row: gradient, projection, Adam and unit length in one pass.

B rows of a batch, D width, F latents, N entries in order of their latent. One program per latent adds the
gradient of its row in registers and writes weights and moments once: the gradient of the table is never stored.
Entries are added in a fixed order, without atomics, so the same step gives the same bits.

The table and its moments are streamed once (`evict_first`), so that the batch's rows, which are read k times, stay
in the cache.

A latent that fires often would hold up the rest, so entries are cut into chunks of CHUNK. Chunks that belong to a
single latent are summed beforehand, by separate programs, and enter as one row each.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64  # most entries that one program adds before it passes on a sum
TOGETHER = 2  # rows loaded at once; the fastest of 2, 4 and 8 on an H100 at D 2304, by 9 %
PER_WARP = 512  # elements of a row that each warp of a program holds


@triton.jit
def _add_entries(total, entry, stop, rows, values, x, columns, inside, D, TOGETHER: tl.constexpr):
    """total + the sum of values[n] * x[rows[n]] over entry <= n < stop."""
    while entry < stop:
        entries = entry + tl.arange(0, TOGETHER)
        valid = entries < stop
        row = tl.load(rows + entries, mask=valid, other=0).to(tl.int64)
        value = tl.load(values + entries, mask=valid, other=0.0)
        tile = tl.load(x + row[:, None] * D + columns[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        total += tl.sum(tile.to(tl.float32) * value[:, None], axis=0)
        entry += TOGETHER
    return total


@triton.jit
def _add_chunks(
    latents, rows, values, x, sums, N, D, CHUNK: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_D: tl.constexpr
):
    """sums[chunk], where all entries of the chunk belong to one latent; `_update` adds the other chunks itself."""
    chunk = tl.program_id(0)
    start = chunk * CHUNK
    if start + CHUNK <= N:  # noqa: SIM102 (a kernel's `and` would load past the end)
        if tl.load(latents + start) == tl.load(latents + start + CHUNK - 1):
            columns = tl.arange(0, BLOCK_D)
            inside = columns < D
            total = tl.zeros((BLOCK_D,), tl.float32)
            total = _add_entries(total, start, start + CHUNK, rows, values, x, columns, inside, D, TOGETHER)
            tl.store(sums + chunk.to(tl.int64) * D + columns, total, mask=inside)


@triton.jit
def _update(
    weights,
    first,
    second,
    low,
    dense,
    frozen,
    offsets,
    rows,
    values,
    x,
    sums,
    D,
    lr,
    bias,
    beta1,
    beta2,
    epsilon,
    weight_decay,
    HAS_DENSE: tl.constexpr,
    HAS_LOW: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row of the table."""
    latent = tl.program_id(0).to(tl.int64)
    if tl.load(frozen) == 0:
        columns = tl.arange(0, BLOCK_D)
        inside = columns < D
        start = tl.load(offsets + latent)
        stop = tl.load(offsets + latent + 1)
        chunk = (start + CHUNK - 1) // CHUNK
        chunks_end = stop // CHUNK
        has_chunks = chunk < chunks_end
        head_end = tl.where(has_chunks, chunk * CHUNK, stop)
        tail = tl.where(has_chunks, chunks_end * CHUNK, stop)

        step_size = tl.load(lr) / tl.load(bias).to(tl.float32)
        root_bias2 = tl.sqrt(tl.load(bias + 1).to(tl.float32))
        place = latent * D + columns
        gradient = tl.zeros((BLOCK_D,), tl.float32)
        if HAS_DENSE:
            gradient += tl.load(dense + place, mask=inside, other=0.0, eviction_policy="evict_first")
        gradient = _add_entries(gradient, start, head_end, rows, values, x, columns, inside, D, TOGETHER)
        while chunk < chunks_end:
            gradient += tl.load(sums + chunk.to(tl.int64) * D + columns, mask=inside, other=0.0)
            chunk += 1
        gradient = _add_entries(gradient, tail, stop, rows, values, x, columns, inside, D, TOGETHER)

        weight = tl.load(weights + place, mask=inside, other=0.0, eviction_policy="evict_first")
        if UNIT:  # the part along the row would only change its length, which is set to one again
            gradient -= weight * tl.sum(weight * gradient)
        gradient += weight_decay * weight
        mean = tl.load(first + place, mask=inside, other=0.0, eviction_policy="evict_first")
        square = tl.load(second + place, mask=inside, other=0.0, eviction_policy="evict_first")
        mean += (1.0 - beta1) * (gradient - mean)
        square = beta2 * square + (1.0 - beta2) * gradient * gradient
        weight -= step_size * mean / (tl.sqrt(square) / root_bias2 + epsilon)
        if UNIT:
            weight = weight / tl.maximum(tl.sqrt(tl.sum(weight * weight)), 1e-12)
        tl.store(weights + place, weight, mask=inside, eviction_policy="evict_first")
        tl.store(first + place, mean, mask=inside, eviction_policy="evict_first")
        tl.store(second + place, square, mask=inside, eviction_policy="evict_first")
        if HAS_LOW:
            tl.store(low + place, weight.to(tl.bfloat16), mask=inside)


class AdamStep(NamedTuple):
    """Adam's settings and a step's values, in the kernel's order; the tensors are on the table's device, where a replay
    reads their current values."""

    lr: Tensor
    bias: Tensor  # float64 [2]: of the two moments, 1 - beta ** steps, steps counted from 1
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


def update_rows(
    weights: Tensor,
    moments: tuple[Tensor, Tensor],
    entries: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None,
    adam: AdamStep,
    frozen: Tensor | None = None,
    *,
    dense: Tensor | None = None,
    low: Tensor | None = None,
    unit: bool = False,
) -> None:
    """Update a table [F, D], whose gradient is the sum of values[n] * x[rows[n]] over the entries of each latent.

    `entries`: offsets [F + 1], latents [N], rows [N] and values [N] ordered by latent, and x [B, D]. `dense` is the
    gradient of other losses in table form, `low` a bfloat16 copy to write as well, `unit` keeps rows at length one. If
    `frozen` is not zero, nothing changes.
    """
    num_latents, width = weights.shape
    offsets, latents, rows, values, x = _no_entries(weights) if entries is None else entries
    frozen = torch.zeros((), device=weights.device) if frozen is None else frozen
    block = triton.next_power_of_2(width)
    warps = max(4, min(32, block // PER_WARP))
    shared = {"CHUNK": CHUNK, "TOGETHER": TOGETHER, "BLOCK_D": block, "num_warps": warps}
    chunks = triton.cdiv(rows.numel(), CHUNK)
    sums = torch.empty(chunks, width, dtype=torch.float32, device=weights.device)
    if chunks > 0:
        _add_chunks[(chunks,)](latents, rows, values, x, sums, rows.numel(), width, **shared)
    _update[(num_latents,)](
        weights,
        *moments,
        weights if low is None else low,
        weights if dense is None else dense,
        frozen,
        offsets,
        rows,
        values,
        x,
        sums,
        width,
        *adam,
        HAS_DENSE=dense is not None,
        HAS_LOW=low is not None,
        UNIT=unit,
        **shared,
    )


def _no_entries(weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    offsets = torch.zeros(weights.shape[0] + 1, dtype=torch.int32, device=weights.device)
    nothing = torch.zeros(0, dtype=torch.int32, device=weights.device)
    return offsets, nothing, nothing, nothing.float(), weights
