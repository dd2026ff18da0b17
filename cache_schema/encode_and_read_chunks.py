"""Chunks: encode arrays for disk, and read rows of them, with checksums verified, into allocated memory.

A chunk is the little-endian array, compressed or not, followed by four bytes of crc32c over it: exactly what
zarr's own codec chain writes, but at the speed of memory.

Rows are windows, or shards for arrays that have a line per shard. A whole chunk is read straight into its place.
For part of a chunk all bytes are read, because the checksum covers them, but only the blocks that hold the part
are decompressed.
"""

from __future__ import annotations

import gzip
import itertools
import math
import zlib
from collections.abc import Iterator

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue] (a compiled module)

from .disk_and_cloud_files import Files
from .errors import ChunkMissing, ShardCorrupt
from .layout import BLOSC, ArrayLayout

CHECKSUM_BYTES = 4
BLOSC_HEADER_BYTES = 16
_COPIED = 2  # flag of a blosc frame whose values are not compressed
_SHUFFLES = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
# What zarr's codecs raise on bytes that they did not write.
_UNDECODABLE = (ArithmeticError, EOFError, RuntimeError, TypeError, ValueError, gzip.BadGzipFile, zlib.error)


def encode(layout: ArrayLayout, chunk: np.ndarray) -> list[np.ndarray]:
    """The buffers to write one after the other; raw arrays are not copied."""
    body = as_bytes(np.ascontiguousarray(chunk, layout.dtype))
    if layout.codec != "raw":
        blosc_options = BLOSC[layout.codec]
        name, level, blocksize = (blosc_options[key] for key in ("cname", "clevel", "blocksize"))
        shuffle = _SHUFFLES[blosc_options["shuffle"]]
        packed = blosc.compress(body.view(layout.dtype), name.encode(), level, shuffle, blocksize)
        body = np.frombuffer(packed, np.uint8)
    return [body, checksum_of(body)]


def plan_reads(layout: ArrayLayout, start: int, stop: int, out: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """The chunks that hold rows start..stop of the array: each one's index, first wanted element and share of `out`."""
    length = layout.chunks[0]
    for index in range(start // length, -(-stop // length)):
        base = index * length
        first, last = max(start - base, 0), min(stop - base, length)
        yield index, first * math.prod(layout.chunks[1:]), out[base + first - start : base + last - start]


def read_chunk(files: Files, layout: ArrayLayout, index: int, first: int, out: np.ndarray) -> None:
    """Read, check and decode one chunk, or the part from element `first` on, into `out`."""
    key, tail = layout.chunk_key(index), np.zeros(CHECKSUM_BYTES, np.uint8)
    try:
        if layout.codec != "raw" or out.nbytes != layout.chunk_bytes:
            decode(layout, np.frombuffer(files.read(key), np.uint8), out, f"chunk {key}", first)
            return
        size, crc = files.read_into(key, as_bytes(out), tail)
    except KeyError:
        raise ChunkMissing(f"chunk {key} is missing") from None
    if size != out.nbytes + CHECKSUM_BYTES:
        raise ShardCorrupt(f"chunk {key}: expected {out.nbytes + CHECKSUM_BYTES} bytes, found {size}")
    check(crc, tail, f"chunk {key}")


def read_with_zarr(array: zarr.Array, files: Files, path: str, start: int, stop: int, out: np.ndarray) -> None:
    """The slow way, for layouts that only zarr knows. Chunks are looked up first: zarr reads missing ones as fill."""
    grid = array.shards or array.chunks
    inner = (range(-(-size // length)) for size, length in zip(array.shape[1:], grid[1:], strict=True))
    for index in itertools.product(range(start // grid[0], -(-stop // grid[0])), *inner):
        key = f"{path}/{array.metadata.encode_chunk_key(index)}"
        if not files.exists(key):
            raise ChunkMissing(f"chunk {key} is missing")
    try:
        out[:] = array[start:stop]
    except _UNDECODABLE as error:
        raise ShardCorrupt(f"{path}, rows {start} to {stop}: {error}") from None


def decode(layout: ArrayLayout, stored: np.ndarray, out: np.ndarray, where: str, first: int = 0) -> None:
    """Check `stored` (uint8, a whole chunk) and decode it into `out` (contiguous), from element `first` on."""
    body, found = stored[:-CHECKSUM_BYTES], stored[-CHECKSUM_BYTES:]
    if len(stored) <= CHECKSUM_BYTES:
        raise ShardCorrupt(f"{where}: truncated to {len(stored)} bytes")
    check(google_crc32c.value(body), found, where)
    begin = first * layout.dtype.itemsize
    wanted = slice(begin, begin + out.nbytes)
    if layout.codec == "raw":
        if len(body) != layout.chunk_bytes:
            raise ShardCorrupt(f"{where}: expected {layout.chunk_bytes} bytes of values, found {len(body)}")
        as_bytes(out)[:] = body[wanted]
        return
    _check_frame(body, layout.chunk_bytes, where)
    try:
        if out.nbytes == layout.chunk_bytes:
            blosc.decompress(body, out)
        elif out.nbytes:
            frame, base, size = _frame_of(body, wanted)
            values = np.empty(size, np.uint8)
            blosc.decompress(frame, values)
            as_bytes(out)[:] = values[wanted.start - base : wanted.stop - base]
    except RuntimeError as error:
        raise ShardCorrupt(f"{where}: cannot be decompressed ({error})") from None


def _frame_of(body: np.ndarray, wanted: slice) -> tuple[np.ndarray, int, int]:
    """A blosc frame of only the blocks that hold the `wanted` bytes, its offset in the chunk and its decompressed size.

    numcodecs decompresses whole frames only. A frame's header is followed by the offsets of its blocks, which may have
    been written in any order.
    """
    plain, block = (int(body[at : at + 4].view("<u4")[0]) for at in (4, 8))
    listed = BLOSC_HEADER_BYTES + 4 * -(-plain // max(1, block))
    if body[2] & _COPIED or block == 0 or listed > len(body):
        return body, 0, plain
    starts = body[BLOSC_HEADER_BYTES:listed].view("<u4").astype(np.int64)
    written = np.append(np.sort(starts), len(body))
    ends = written[np.searchsorted(written, starts, "right").clip(max=len(starts))]
    first = max(0, min(wanted.start // block, plain // block - 1))  # blosc cannot read a shorter last block on its own
    last = -(-wanted.stop // block)
    blocks = [body[start:end] for start, end in zip(starts[first:last], ends[first:last], strict=True)]
    places = np.cumsum([BLOSC_HEADER_BYTES + 4 * len(blocks), *map(len, blocks)]).astype("<u4")
    size = min(last * block, plain) - first * block
    sizes = np.array([size, block, places[-1]], "<u4")
    return np.concatenate([body[:4], as_bytes(sizes), as_bytes(places[:-1]), *blocks]), first * block, size


def _check_frame(body: np.ndarray, nbytes: int, where: str) -> None:
    """The sizes in a blosc header (bytes 4 and 12) must match the memory that decoding will touch."""
    if len(body) < BLOSC_HEADER_BYTES:
        raise ShardCorrupt(f"{where}: {len(body)} bytes are too few for a compressed chunk")
    plain, packed = (int(body[at : at + 4].view("<u4")[0]) for at in (4, 12))
    if plain != nbytes or packed != len(body):
        raise ShardCorrupt(
            f"{where}: expected {nbytes} bytes of values in {len(body)} stored, found {plain} in {packed}"
        )


def checksum_of(body: np.ndarray) -> np.ndarray:
    return np.array([google_crc32c.value(body)], "<u4").view(np.uint8)


def check(computed: int, stored: np.ndarray, where: str) -> None:
    """Compare a computed crc32c with the four stored bytes."""
    expected = int(stored.view("<u4")[0])
    if computed != expected:
        raise ShardCorrupt(f"{where}: expected checksum {expected:08x}, found {computed:08x}")


def as_bytes(array: np.ndarray) -> np.ndarray:
    """A contiguous array's memory as uint8, without a copy."""
    return array.reshape(-1).view(np.uint8)
