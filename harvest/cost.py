"""What a harvest will cost, before it is begun: bytes by array, and time.

Sizes are first bounded from the manifest alone: residuals cost what they cost, and an attention row holds at
most its topk. Where that bound leaves a doubt, or time is asked for, a few batches are harvested into a
store in memory by the very code that will harvest the rest.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

import fsspec
import numpy as np

from ..cache_schema import Manifest, StoreFull, StoreWriter
from ..cache_schema.commits import CommitRecord
from ..cache_schema.files import Files
from ..cache_schema.identity import seal
from ..cache_schema.layout import arrays_of
from .shards import Harvester, harvest_shards

TIMED_BATCHES = 3
RESERVE_BYTES = 64 * 2**20  # records, index and the file system's own


@dataclass(frozen=True)
class Cost:
    """Measured on a few batches."""

    bytes_per_token: dict[str, float]
    tokens_per_second: float

    @property
    def total_per_token(self) -> float:
        return sum(self.bytes_per_token.values())


def bound_bytes(manifest: Manifest, shards: int) -> int:
    """What so many shards can take on disk at most."""
    whole = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays_of(manifest).values())
    return whole * shards // manifest.shards + RESERVE_BYTES


def least_bytes(manifest: Manifest) -> int:
    """What a store takes at least: its activations, at best compressed to a half, and its tokens."""
    arrays = arrays_of(manifest)
    acts = sum(math.prod(arrays[site.path].shape) * arrays[site.path].dtype.itemsize for site in manifest.sites)
    return acts // (1 if manifest.codec == "raw" else 2) + 8 * manifest.tokens


def measure_cost(harvester: Harvester, tokens: np.ndarray) -> Cost:
    """Harvest a few batches into memory: the first one warms up, the others are timed."""
    batch = harvester.batch_windows
    tokens = np.resize(tokens, (batch * (1 + TIMED_BATCHES), tokens.shape[1]))
    windows = len(tokens)
    spans = {"train": (0, windows), "validation": (windows, windows), "test": (windows, windows)}
    manifest = seal(replace(harvester.manifest, windows=windows, splits=spans, shard_windows=batch))
    url = f"memory://saemill-{uuid.uuid4().hex}"
    records: list[CommitRecord] = []
    with StoreWriter.create(url, manifest, tokens, np.zeros_like(tokens)) as writer:
        trial = replace(harvester, manifest=manifest)
        harvest_shards(writer, trial, [0], lambda _: None)
        start = time.perf_counter()
        harvest_shards(writer, trial, range(1, 1 + TIMED_BATCHES), records.append)
        seconds = time.perf_counter() - start
    fsspec.filesystem("memory").rm(url, recursive=True)
    return Cost(_bytes_per_token(records, manifest), TIMED_BATCHES * batch * manifest.context / seconds)


def require_space(url: str, free: int | None, needed: int) -> None:
    """Refuse to begin what the disk cannot hold; None of an object store is as much as it takes."""
    if free is not None and needed > free:
        raise StoreFull(
            f"the harvest needs {needed / 1e9:,.2f} GB, but the disk of {url} has {free / 1e9:,.2f} GB free. "
            "Ask for fewer --tokens or layers, try --codec zstd, or give another --out"
        )


def is_bound_to_fit(files: Files, manifest: Manifest, shards: int) -> bool:
    """Whether the disk holds even the most that the shards can take."""
    free = files.free_bytes()
    return free is None or bound_bytes(manifest, shards) <= free


def tokens_in(manifest: Manifest, shards: Sequence[int]) -> int:
    return sum(stop - start for start, stop in map(manifest.shard_range, shards)) * manifest.context


def needed_bytes(cost: Cost, manifest: Manifest, shards: Sequence[int]) -> int:
    """What these shards will take, by measure."""
    return int(cost.total_per_token * tokens_in(manifest, shards)) + RESERVE_BYTES if shards else 0


def _bytes_per_token(records: Sequence[CommitRecord], manifest: Manifest) -> dict[str, float]:
    tokens = sum(stop - start for start, stop in (record.windows for record in records)) * manifest.context
    paths = records[0].arrays
    return {path: sum(record.arrays[path].bytes for record in records) / tokens for path in paths}
