"""Digests of content: of one array's values in one shard, and of a whole store.

xxh3_128 runs at the speed of memory, so that every committed byte can be hashed without slowing the
harvest. It guards against damage and mix-ups, not against somebody who forges a store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np
import xxhash

from .commits import CommitRecord
from .compression import as_bytes
from .manifest import Manifest


def array_digest(*arrays: np.ndarray) -> str:
    """Digest of the values of one or more arrays, one after the other, as little-endian bytes."""
    state = xxhash.xxh3_128()
    for array in arrays:
        state.update(as_bytes(np.ascontiguousarray(array)).data)
    return f"xxh3_128:{state.hexdigest()}"


def store_digest(manifest: Manifest, records: Iterable[CommitRecord]) -> str:
    """One hash of all content: the cache id and, in shard order, every array's digest.

    Codec, shard files, host and path leave no trace; a shard that is not committed does.
    """
    state = hashlib.sha256(manifest.cache_id.encode())
    for record in records:
        lines = sorted((path, entry.digest) for path, entry in record.arrays.items())
        state.update(json.dumps([record.windows, lines]).encode())
    return f"sha256:{state.hexdigest()}"
