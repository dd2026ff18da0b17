"""Exact selection: the k largest of each row, and the largest of a whole batch.

B rows, F latents. Floats are read as whole numbers of the same order ("keys"), 16 bits for bfloat16 and 32
for float32, so the k-th largest is found bit by bit: a key is tried, those at or above it are counted.
Equal entries are taken in order of their place. A row is searched in registers, in segments of SEGMENT
latents; what each segment offers is searched once more.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (`kernel[grid](...)` is how Triton launches, and its language is not Python's)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SEGMENT = 8192  # latents that one program holds in registers: 32 in each of 256 threads
DIGIT_BITS = 4  # of a batch's threshold, found in each pass over the batch
BITS = {torch.bfloat16: 16, torch.float32: 32}


@triton.jit
def _keys(x, BITS: tl.constexpr):
    """uint32 in the order of the floats."""
    if BITS == 16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        signed = tl.where(bits < 0, bits ^ 0x7FFF, bits)
        keys = (signed + 0x8000).to(tl.uint32)
    else:
        bits = x.to(tl.int32, bitcast=True)
        signed = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        keys = signed.to(tl.uint32, bitcast=True) ^ 0x80000000
    return keys


@triton.jit
def _choose(keys, valid, k, BITS: tl.constexpr):
    """bool, the k largest of the valid keys; of equal ones the first."""
    lowest = tl.zeros((), tl.uint32)  # will be the k-th largest key
    bit = tl.full((), 1, tl.uint32) << (BITS - 1)
    for _ in range(BITS):
        tried = lowest | bit
        enough = tl.sum((keys >= tried).to(tl.int32)) >= k
        lowest = tl.where(enough, tried, lowest)
        bit = bit >> 1
    above = keys > lowest
    equal = (keys == lowest) & valid
    wanted = k - tl.sum(above.to(tl.int32))
    return above | (equal & (tl.cumsum(equal.to(tl.int32)) <= wanted))


@triton.jit
def _top_of_segments(pre, out, F, k, segments, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[row, segment, :k]: latents of the segment's k largest in rising order, -1 behind the last."""
    row = tl.program_id(0)
    segment = tl.program_id(1)
    latents = segment * BLOCK + tl.arange(0, BLOCK)
    valid = latents < F
    values = tl.load(pre + row.to(tl.int64) * F + latents, mask=valid, other=0.0)
    keys = tl.where(valid, _keys(values, BITS), 0)
    chosen = _choose(keys, valid, tl.minimum(k, F - segment * BLOCK), BITS)
    place = tl.cumsum(chosen.to(tl.int32)) - 1
    tl.store(out + (row.to(tl.int64) * segments + segment) * k + place, latents, mask=chosen)


@triton.jit
def _top_of_offered(pre, offered, out, F, k, count, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[row, :k]: the k largest of the latents that a row's segments offer."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    latents = tl.load(offered + row * count + places, mask=places < count, other=-1)
    valid = latents >= 0
    values = tl.load(pre + row * F + latents, mask=valid, other=0.0)
    keys = tl.where(valid, _keys(values, BITS), 0)
    chosen = _choose(keys, valid, k, BITS)
    place = tl.cumsum(chosen.to(tl.int32)) - 1
    tl.store(out + row * k + place, latents, mask=chosen)


def can_select(pre: Tensor) -> bool:
    """Whether these kernels know the type of these pre-activations."""
    return pre.dtype in BITS and pre.is_contiguous()


def top_latents(pre: Tensor, k: int) -> Tensor:
    """int32 [B, k]: latents of the k largest entries of each row, in rising order."""
    rows, width = pre.shape
    block = min(SEGMENT, triton.next_power_of_2(width))
    segments = triton.cdiv(width, block)
    # One segment always finds k; of several the last may hold fewer, and says so by -1.
    shape = (rows, segments * k)
    offered = (
        torch.empty(shape, dtype=torch.int32, device=pre.device)
        if segments == 1
        else torch.full(shape, -1, dtype=torch.int32, device=pre.device)
    )
    bits = BITS[pre.dtype]
    _top_of_segments[(rows, segments)](
        pre, offered, width, k, segments, BITS=bits, BLOCK=block, num_warps=_warps(block)
    )
    if segments == 1:
        return offered
    out = torch.empty(rows, k, dtype=torch.int32, device=pre.device)
    block = triton.next_power_of_2(segments * k)
    _top_of_offered[(rows,)](pre, offered, out, width, k, segments * k, BITS=bits, BLOCK=block, num_warps=_warps(block))
    return out


def _warps(block: int) -> int:
    return max(1, min(8, block // 256))


@triton.jit
def _count_digits(pre, prefix, counts, numel, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """counts[program, t]: how many keys are at or above the prefix with digit t behind it."""
    program = tl.program_id(0)
    places = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = places < numel
    keys = tl.where(valid, _keys(tl.load(pre + places, mask=valid, other=0.0), BITS), 0)
    found = tl.load(prefix).to(tl.uint32)
    for digit in tl.static_range(1, 16):
        tried = found | (tl.full((), digit, tl.uint32) << SHIFT)
        tl.store(counts + program * 16 + digit, tl.sum((keys >= tried).to(tl.int32)))


@triton.jit
def _count_rows(pre, lowest, above, equal, F: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """How many entries of each row are above the lowest key kept, and how many are equal to it."""
    row = tl.program_id(0)
    key = tl.load(lowest).to(tl.uint32)
    num_above = tl.zeros((), tl.int32)
    num_equal = tl.zeros((), tl.int32)
    for start in range(0, F, BLOCK):
        latents = start + tl.arange(0, BLOCK)
        valid = latents < F
        keys = _keys(tl.load(pre + row.to(tl.int64) * F + latents, mask=valid, other=0.0), BITS)
        num_above += tl.sum((valid & (keys > key)).to(tl.int32))
        num_equal += tl.sum((valid & (keys == key)).to(tl.int32))
    tl.store(above + row, num_above)
    tl.store(equal + row, num_equal)


@triton.jit
def _write_rows(pre, lowest, offsets, ties, out, F: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The latents of each row that are above the lowest key, and the first `ties[row]` of those equal to it."""
    row = tl.program_id(0)
    key = tl.load(lowest).to(tl.uint32)
    ties_left = tl.load(ties + row)
    place = tl.load(offsets + row)
    for start in range(0, F, BLOCK):
        latents = start + tl.arange(0, BLOCK)
        valid = latents < F
        keys = _keys(tl.load(pre + row.to(tl.int64) * F + latents, mask=valid, other=0.0), BITS)
        equal = valid & (keys == key)
        chosen = (valid & (keys > key)) | (equal & (tl.cumsum(equal.to(tl.int32)) <= ties_left))
        numbers = chosen.to(tl.int32)
        tl.store(out + place + tl.cumsum(numbers) - 1, latents, mask=chosen)
        place += tl.sum(numbers)
        ties_left -= tl.sum((equal & chosen).to(tl.int32))


def top_of_batch(pre: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Offsets int32 [B + 1] and latents int32 [count] of the `count` largest entries of the whole batch.

    Always `count` of them, whatever their sign: the shape does not depend on the data.
    """
    rows, width = pre.shape
    bits, device = BITS[pre.dtype], pre.device
    lowest = _kth_key(pre, count, bits)
    block = min(SEGMENT, triton.next_power_of_2(width))
    above, equal = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2))
    _count_rows[(rows,)](pre, lowest, above, equal, width, BITS=bits, BLOCK=block, num_warps=_warps(block))
    wanted = count - above.sum()
    before = equal.cumsum(0) - equal
    ties = torch.minimum((wanted - before).clamp_min(0), equal).to(torch.int32)
    offsets = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    torch.cumsum(above + ties, 0, dtype=torch.int32, out=offsets[1:])
    out = torch.empty(count, dtype=torch.int32, device=device)
    _write_rows[(rows,)](pre, lowest, offsets, ties, out, width, BITS=bits, BLOCK=block, num_warps=_warps(block))
    return offsets, out


def _kth_key(pre: Tensor, count: int, bits: int) -> Tensor:
    """int64 [], the key of the `count`-th largest entry."""
    programs = triton.cdiv(pre.numel(), SEGMENT)
    counts = torch.full((programs, 1 << DIGIT_BITS), SEGMENT, dtype=torch.int32, device=pre.device)
    lowest = torch.zeros((), dtype=torch.int64, device=pre.device)
    for shift in range(bits - DIGIT_BITS, -1, -DIGIT_BITS):
        _count_digits[(programs,)](
            pre, lowest, counts, pre.numel(), SHIFT=shift, BITS=bits, BLOCK=SEGMENT, num_warps=_warps(SEGMENT)
        )
        digit = (counts.sum(0, dtype=torch.int64) >= count).sum() - 1  # digit 0 is never short of entries
        lowest = lowest + (digit << shift)
    return lowest
