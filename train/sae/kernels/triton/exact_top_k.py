"""Exact selection: the k largest of each row, and the largest of a whole batch.

B rows, F latents. Floats are read as integers of the same order ("keys"), 16 bits for bfloat16 and 32 for
float32. Equal entries are taken in order of their place.

1. The latents of a row are divided into groups. The k-th largest of the groups' maxima is a floor: at least k
   entries reach it, and with many more groups than k hardly more than k.
2. Each row offers the latents that reach its floor. There is room for ROOM * k; a row that offers more, which can
   happen if its groups differ a lot, is searched as a whole instead, and delays all others.
3. Among the offered entries the k-th largest key is found bit by bit: try a key and count those at or above it.

A batch is treated in the same way, with one floor for all rows. Rows offer different numbers of entries, because tokens
differ, and have room for BATCH_ROOM times their share. So entries are read twice, in order, whatever k.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (`kernel[grid](...)` is how Triton launches, and its language is not Python's)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

CHUNK = 2048  # latents that a program handles at once
GROUPS = 16  # groups of a row for each wanted entry, at least
MOST_GROUPS = 8192  # as many as one program holds in registers
ROOM = 4  # latents that a row may offer for each wanted one
BATCH_ROOM = 16  # the same for a batch, relative to the mean number wanted per row
DIGIT_BITS = 4  # bits of a batch's smallest key that each pass finds
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
def _kth(keys, k, BITS: tl.constexpr):
    """The k-th largest of the keys; zero where there are fewer."""
    lowest = tl.zeros((), tl.uint32)
    bit = tl.full((), 1, tl.uint32) << (BITS - 1)
    for step in range(BITS):  # noqa: B007
        tried = lowest | bit
        enough = tl.sum((keys >= tried).to(tl.int32)) >= k
        lowest = tl.where(enough, tried, lowest)
        bit = bit >> 1
    return lowest


@triton.jit
def _largest_of_groups(pre, row, F, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """uint32 [GROUPS]: group g holds latents g, g + GROUPS, g + 2 GROUPS, ..."""
    largest = tl.zeros((GROUPS,), tl.uint32)
    for start in range(0, F, GROUPS):
        latents = start + tl.arange(0, GROUPS)
        valid = latents < F
        values = tl.load(pre + row * F + latents, mask=valid, other=0.0)
        largest = tl.maximum(largest, tl.where(valid, _keys(values, BITS), 0))
    return largest


@triton.jit
def _row_floors(pre, floors, k, F, BITS: tl.constexpr, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tl.store(floors + row, _kth(_largest_of_groups(pre, row, F, BITS, GROUPS), k, BITS).to(tl.int64))


@triton.jit
def _batch_groups(pre, out, F: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = _largest_of_groups(pre, row, F, BITS, GROUPS)
    tl.store(out + row * GROUPS + tl.arange(0, GROUPS), largest.to(tl.int64))


@triton.jit
def _offer(pre, floors, floor_stride, offered, counts, room, F, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """offered[row, :]: the latents that reach the row's floor, in ascending order, up to `room` of them."""
    row = tl.program_id(0).to(tl.int64)
    floor = tl.load(floors + row * floor_stride).to(tl.uint32)
    count = tl.zeros((), tl.int32)
    for start in range(0, F, CHUNK):
        latents = start + tl.arange(0, CHUNK)
        valid = latents < F
        keys = _keys(tl.load(pre + row * F + latents, mask=valid, other=0.0), BITS)
        reaches = ((keys >= floor) & valid).to(tl.int32)
        place = count + tl.cumsum(reaches) - 1
        tl.store(offered + row * room + place, latents, mask=(reaches > 0) & (place < room))
        count += tl.sum(reaches)
    tl.store(counts + row, count)


@triton.jit
def _load_offered(pre, offered, row, count, room, start, F, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of latents from `start` on, which of them are valid, and keys: of the row's offer, or the whole row."""
    places = start + tl.arange(0, BLOCK)
    if count <= room:
        valid = places < count
        latents = tl.load(offered + row * room + places, mask=valid, other=0)
    else:
        valid = places < F
        latents = places
    values = tl.load(pre + row * F + latents, mask=valid, other=0.0)
    return latents, valid, tl.where(valid, _keys(values, BITS), 0)


@triton.jit
def _write(pre, offered, row, count, room, lowest, ties, out, F, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Write to `out` the latents above the lowest key and the first `ties` of those equal to it."""
    stop = tl.where(count <= room, count, F)
    start = tl.zeros((), tl.int32)
    written = tl.zeros((), tl.int32)
    while start < stop:
        latents, valid, keys = _load_offered(pre, offered, row, count, room, start, F, BITS, BLOCK)
        equal = valid & (keys == lowest)
        chosen = (keys > lowest) | (equal & (tl.cumsum(equal.to(tl.int32)) <= ties))
        numbers = chosen.to(tl.int32)
        tl.store(out + written + tl.cumsum(numbers) - 1, latents, mask=chosen)
        written += tl.sum(numbers)
        ties -= tl.sum((equal & chosen).to(tl.int32))
        start += BLOCK


@triton.jit
def _top_of_row(pre, offered, counts, out, k, room, F, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[row, :k], in ascending order."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    stop = tl.where(count <= room, count, F)
    lowest = tl.zeros((), tl.uint32)
    bit = tl.full((), 1, tl.uint32) << (BITS - 1)
    above = tl.zeros((), tl.int32)
    for step in range(BITS):  # noqa: B007
        tried = lowest | bit
        found = tl.zeros((), tl.int32)
        start = tl.zeros((), tl.int32)
        while start < stop:
            _latents, _valid, keys = _load_offered(pre, offered, row, count, room, start, F, BITS, BLOCK)
            found += tl.sum((keys >= tried).to(tl.int32))
            start += BLOCK
        lowest = tl.where(found >= k, tried, lowest)
        above = tl.where(found >= k, above, found)  # in the end: how many are above the k-th largest
        bit = bit >> 1
    _write(pre, offered, row, count, room, lowest, k - above, out + row * k, F, BITS, BLOCK)


@triton.jit(do_not_specialize=["shift"])  # otherwise each digit would be compiled separately
def _count_digits(keys, prefix, counts, numel, shift, BLOCK: tl.constexpr):
    """counts[program, t]: how many keys are at or above the prefix followed by digit t."""
    program = tl.program_id(0)
    places = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(keys + places, mask=places < numel, other=0).to(tl.uint32)
    lowest = tl.load(prefix).to(tl.uint32)
    for digit in tl.static_range(1, 16):
        tried = lowest | (tl.full((), digit, tl.uint32) << shift)
        tl.store(counts + program * 16 + digit, tl.sum((found >= tried).to(tl.int32)))


@triton.jit(do_not_specialize=["shift"])
def _count_offered_digits(
    pre, offered, offers, prefix, counts, room, shift, F: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """counts[row, t]: how many of a row's keys are at or above the prefix followed by digit t."""
    row = tl.program_id(0).to(tl.int64)
    lowest = tl.load(prefix).to(tl.uint32)
    count = tl.load(offers + row)
    stop = tl.where(count <= room, count, F)
    digits = tl.arange(0, 16)
    tried = lowest | (digits.to(tl.uint32) << shift)
    total = tl.zeros((16,), tl.int32)
    start = tl.zeros((), tl.int32)
    while start < stop:
        _latents, valid, keys = _load_offered(pre, offered, row, count, room, start, F, BITS, BLOCK)
        total += tl.sum(((keys[:, None] >= tried[None, :]) & valid[:, None]).to(tl.int32), axis=0)
        start += BLOCK
    tl.store(counts + row * 16 + digits, total)


@triton.jit
def _count_kept(
    pre, offered, offers, lowest, above, equal, room, F: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """How many entries of each row are above the lowest key kept, and how many are equal to it."""
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(lowest).to(tl.uint32)
    count = tl.load(offers + row)
    stop = tl.where(count <= room, count, F)
    num_above = tl.zeros((), tl.int32)
    num_equal = tl.zeros((), tl.int32)
    start = tl.zeros((), tl.int32)
    while start < stop:
        _latents, valid, keys = _load_offered(pre, offered, row, count, room, start, F, BITS, BLOCK)
        num_above += tl.sum((valid & (keys > key)).to(tl.int32))
        num_equal += tl.sum((valid & (keys == key)).to(tl.int32))
        start += BLOCK
    tl.store(above + row, num_above)
    tl.store(equal + row, num_equal)


@triton.jit
def _write_kept(
    pre, offered, offers, lowest, offsets, ties, out, room, F: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Each row's part of the batch's largest, at its offset."""
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(lowest).to(tl.uint32)
    place = tl.load(offsets + row)
    _write(pre, offered, row, tl.load(offers + row), room, key, tl.load(ties + row), out + place, F, BITS, BLOCK)


def top_latents(pre: Tensor, k: int) -> Tensor:
    """int32 [B, k]: latents of the k largest entries of each row, in ascending order."""
    pre = pre.contiguous()
    rows, width = pre.shape
    bits = BITS[pre.dtype]
    out = torch.empty(rows, k, dtype=torch.int32, device=pre.device)
    offered, offers, room = _no_offers(pre)
    groups = _groups(width, k)
    if groups is not None:
        floors = torch.empty(rows, dtype=torch.int64, device=pre.device)
        _row_floors[(rows,)](pre, floors, k, F=_built_in(width), BITS=bits, GROUPS=groups, num_warps=_warps(groups))
        offered, offers, room = _make_offers(pre, floors, 1, ROOM * k)
    block = min(CHUNK, triton.next_power_of_2(width if groups is None else room))
    _top_of_row[(rows,)](
        pre, offered, offers, out, k, room, F=_built_in(width), BITS=bits, BLOCK=block, num_warps=_warps(block)
    )
    return out


def top_of_batch(pre: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Offsets int32 [B + 1] and latents int32 [count] of the `count` largest entries of the whole batch.

    Always exactly `count`, whatever their sign: the shape does not depend on the data.
    """
    pre = pre.contiguous()
    rows, width = pre.shape
    bits, device = BITS[pre.dtype], pre.device
    wanted = triton.cdiv(count, rows)  # mean per row
    offered, offers, room = _no_offers(pre)
    groups = _groups(width, wanted)
    if groups is not None:
        largest = torch.empty(rows, groups, dtype=torch.int64, device=device)
        _batch_groups[(rows,)](pre, largest, F=width, BITS=bits, GROUPS=groups, num_warps=_warps(groups))
        offered, offers, room = _make_offers(pre, _kth_of_all(largest, count, bits), 0, BATCH_ROOM * wanted)
    block = min(512, triton.next_power_of_2(width if groups is None else room))
    fixed = {"F": width, "BITS": bits, "BLOCK": block, "num_warps": _warps(block)}
    lowest = torch.zeros((), dtype=torch.int64, device=device)
    counts = torch.empty(rows, 1 << DIGIT_BITS, dtype=torch.int32, device=device)
    for shift in range(bits - DIGIT_BITS, -1, -DIGIT_BITS):
        _count_offered_digits[(rows,)](pre, offered, offers, lowest, counts, room, shift, **fixed)
        lowest = _with_digit(lowest, counts, count, shift)
    above, equal = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2))
    _count_kept[(rows,)](pre, offered, offers, lowest, above, equal, room, **fixed)
    before = equal.cumsum(0) - equal
    ties = torch.minimum((count - above.sum() - before).clamp_min(0), equal).to(torch.int32)
    offsets = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    torch.cumsum(above + ties, 0, dtype=torch.int32, out=offsets[1:])
    out = torch.empty(count, dtype=torch.int32, device=device)
    _write_kept[(rows,)](pre, offered, offers, lowest, offsets, ties, out, room, **fixed)
    return offsets, out


def _groups(width: int, wanted: int) -> int | None:
    """How many groups to divide the latents into; None if searching all latents is as cheap."""
    groups = min(MOST_GROUPS, max(1024, 1 << (GROUPS * wanted - 1).bit_length()))
    return groups if width > 2 * groups and groups >= 2 * wanted else None


def _no_offers(pre: Tensor) -> tuple[Tensor, Tensor, int]:
    """No room for offers: every row is searched as a whole."""
    too_many = torch.ones(pre.shape[0], dtype=torch.int32, device=pre.device)
    return too_many, too_many, 0


def _make_offers(pre: Tensor, floors: Tensor, stride: int, room: int) -> tuple[Tensor, Tensor, int]:
    """Each row's offer [B, room], their sizes [B], and the room."""
    rows, width = pre.shape
    offered = torch.empty(rows, room, dtype=torch.int32, device=pre.device)
    offers = torch.empty(rows, dtype=torch.int32, device=pre.device)
    _offer[(rows,)](
        pre, floors, stride, offered, offers, room, F=_built_in(width), BITS=BITS[pre.dtype], CHUNK=CHUNK, num_warps=4
    )
    return offered, offers, room


def _kth_of_all(keys: Tensor, count: int, bits: int) -> Tensor:
    """int64 [], the `count`-th largest key; zero if there are fewer."""
    programs = triton.cdiv(keys.numel(), CHUNK)
    counts = torch.full((programs, 1 << DIGIT_BITS), CHUNK, dtype=torch.int32, device=keys.device)
    lowest = torch.zeros((), dtype=torch.int64, device=keys.device)
    for shift in range(bits - DIGIT_BITS, -1, -DIGIT_BITS):
        _count_digits[(programs,)](keys, lowest, counts, keys.numel(), shift, BLOCK=CHUNK, num_warps=4)
        lowest = _with_digit(lowest, counts, count, shift)
    return lowest


def _with_digit(lowest: Tensor, counts: Tensor, count: int, shift: int) -> Tensor:
    """The key with its next digit, the largest that at least `count` keys reach; all of these reach digit 0."""
    enough = (counts.sum(0, dtype=torch.int64) >= count)[1:].sum()
    return lowest + (enough << shift)


def _built_in(width: int) -> int | tl.constexpr:
    """A dictionary's width as a compile-time constant. The number of dead latents, among which AuxK chooses, changes
    every few steps, so it stays an argument: compiling for each number would take seconds. (The interpreter accepts no
    argument as the end of a range.)"""
    return tl.constexpr(width) if width % 1024 == 0 or knobs.runtime.interpret else width


def _warps(block: int) -> int:
    return max(1, min(8, block // 256))
