"""Read rows of one array, chunk by chunk, straight into memory: checked, and several at a time.

Rows are windows, or shards for arrays that have a line per shard. A chunk that is wanted whole is read
into its place. Of one that is wanted in part all bytes are read, because its checksum covers them, but only the
blocks that hold the part are decompressed.
"""

from __future__ import annotations

import gzip
import itertools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import zarr

from .chunk_codec import CHECKSUM_BYTES, as_bytes, check, decode
from .disk_and_cloud_files import Files
from .errors import ChunkMissing, ShardCorrupt
from .layout import ArrayLayout

# What zarr's codecs raise on bytes that are not theirs.
_UNDECODABLE = (ArithmeticError, EOFError, RuntimeError, TypeError, ValueError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True)
class ChunkRead:
    """Rows `first`..`last` of the chunk go to `out`."""

    layout: ArrayLayout
    index: int
    first: int
    last: int
    out: np.ndarray


def plan_reads(layout: ArrayLayout, start: int, stop: int, out: np.ndarray) -> Iterator[ChunkRead]:
    """The chunks that hold rows start..stop of the array, each with its share of `out`."""
    length = layout.chunks[0]
    for index in range(start // length, -(-stop // length)):
        base = index * length
        first, last = max(start - base, 0), min(stop - base, length)
        yield ChunkRead(layout, index, first, last, out[base + first - start : base + last - start])


def read_chunk(files: Files, read: ChunkRead) -> None:
    """Read, check and decode one chunk, or rows of it, into its place."""
    _read(files, read.layout, read.index, read.first * math.prod(read.layout.chunks[1:]), read.out)


def read_part_of_row(files: Files, layout: ArrayLayout, row: int, first: int, out: np.ndarray) -> None:
    """The same for part of one row, from its element `first` on."""
    index, before = divmod(row, layout.chunks[0])
    _read(files, layout, index, before * math.prod(layout.chunks[1:]) + first, out)


def read_with_zarr(array: zarr.Array, files: Files, path: str, start: int, stop: int, out: np.ndarray) -> None:
    """The slow way, for layouts that only zarr knows. Chunks are looked for first: zarr reads absent ones as fill."""
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


def _read(files: Files, layout: ArrayLayout, index: int, first: int, out: np.ndarray) -> None:
    key = layout.chunk_key(index)
    try:
        if layout.codec == "raw" and out.nbytes == layout.chunk_bytes:
            _read_raw(files, key, as_bytes(out))
        else:
            decode(layout, np.frombuffer(files.read(key), np.uint8), out, f"chunk {key}", first)
    except KeyError:
        raise ChunkMissing(f"chunk {key} is missing") from None


def _read_raw(files: Files, key: str, body: np.ndarray) -> None:
    tail = np.zeros(CHECKSUM_BYTES, np.uint8)
    size, crc = files.read_into(key, body, tail)
    if size != len(body) + CHECKSUM_BYTES:
        raise ShardCorrupt(f"chunk {key}: expected {len(body) + CHECKSUM_BYTES} bytes, found {size}")
    check(crc, tail, f"chunk {key}")
