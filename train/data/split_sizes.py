"""What a split holds, in numbers, before anything trains.

The counts of trainable tokens fix the read order (`read_order.py`); the shares say how often two tokens or windows of
an ideal batch would share a document (`shuffle_quality.py`). Special tokens are in neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...cache_schema import Manifest, Store
from ...cache_schema.layout import arrays_of


@dataclass(frozen=True, eq=False)
class SplitSizes:
    """All that decides the read order of a split."""

    first_window: int
    context: int
    shard_windows: int
    chunk_windows: int  # windows that lie in one chunk of residuals: no read is smaller
    trainable: np.ndarray  # int64 [windows of the split], tokens that are not special
    same_document: float  # the chance that two of these tokens share a document
    same_first_document: float  # the chance that two windows begin in one document

    @property
    def windows(self) -> int:
        return len(self.trainable)

    @property
    def tokens(self) -> int:
        return int(self.trainable.sum())


def measure_split(store: Store, split: str) -> SplitSizes:
    """As the store has counted, or by a pass over its tokens where it is older than its counts."""
    manifest = store.manifest
    trainable, numbers = store.counts(split)
    return SplitSizes(
        first_window=manifest.splits[split][0],
        context=manifest.context,
        shard_windows=manifest.shard_windows,
        chunk_windows=chunk_windows(manifest),
        trainable=trainable,
        same_document=numbers.same_document,
        same_first_document=numbers.same_first_document,
    )


def chunk_windows(manifest: Manifest) -> int:
    """Windows in one chunk of residuals."""
    return arrays_of(manifest)[manifest.sites[0].path].chunks[0] if manifest.sites else manifest.shard_windows
