"""Chunk bytes: encode an array for disk, and decode into memory that is already allocated.

A chunk is the little-endian array, compressed or not, followed by four bytes of crc32c over it:
exactly what zarr's own codec chain writes, but at the speed of memory, which zarr's path is not.
"""

from __future__ import annotations

import google_crc32c
import numpy as np
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue] (a compiled module)

from .errors import ShardCorrupt
from .layout import BLOSC, ArrayLayout

CHECKSUM_BYTES = 4
BLOSC_HEADER_BYTES = 16
_SHUFFLES = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


def encode(layout: ArrayLayout, chunk: np.ndarray) -> list[np.ndarray]:
    """The buffers to write one after the other; an array that is stored raw is not copied."""
    body = as_bytes(np.ascontiguousarray(chunk, layout.dtype))
    if layout.codec != "raw":
        found = BLOSC[layout.codec]
        compressor, shuffle = found["cname"].encode(), _SHUFFLES[found["shuffle"]]
        typed = body.view(layout.dtype)
        body = np.frombuffer(blosc.compress(typed, compressor, found["clevel"], shuffle, found["blocksize"]), np.uint8)
    return [body, checksum_of(body)]


def decode(layout: ArrayLayout, stored: np.ndarray, out: np.ndarray, where: str) -> None:
    """Check `stored` (uint8, a whole chunk) and decode it into `out` (contiguous, a whole chunk)."""
    body, found = stored[:-CHECKSUM_BYTES], stored[-CHECKSUM_BYTES:]
    if len(stored) <= CHECKSUM_BYTES:
        raise ShardCorrupt(f"{where}: truncated to {len(stored)} bytes")
    check(google_crc32c.value(body), found, where)
    if layout.codec == "raw":
        if len(body) != out.nbytes:
            raise ShardCorrupt(f"{where}: expected {out.nbytes} bytes of values, found {len(body)}")
        as_bytes(out)[:] = body
        return
    _check_frame(body, out, where)
    try:
        blosc.decompress(body, out)
    except RuntimeError as error:
        raise ShardCorrupt(f"{where}: cannot be decompressed ({error})") from None


def _check_frame(body: np.ndarray, out: np.ndarray, where: str) -> None:
    """The sizes in a blosc header (bytes 4 and 12) must match the memory that decoding will touch."""
    if len(body) < BLOSC_HEADER_BYTES:
        raise ShardCorrupt(f"{where}: {len(body)} bytes are too few for a compressed chunk")
    plain, packed = (int(body[at : at + 4].view("<u4")[0]) for at in (4, 12))
    if plain != out.nbytes or packed != len(body):
        raise ShardCorrupt(
            f"{where}: expected {out.nbytes} bytes of values in {len(body)} stored, found {plain} in {packed}"
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
