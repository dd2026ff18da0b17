"""What a split holds, in numbers: one cheap pass over its tokens, before anything trains.

The counts of trainable tokens fix the read order (`plan.py`); the counts per document say how often two
tokens of an ideal batch would share a document (`shuffle_quality.py`). Special tokens are in neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...cache_schema import Manifest, Request, Store
from ...cache_schema.layout import arrays_of
from ...cache_schema.moments import is_special


@dataclass(frozen=True, eq=False)
class SplitSizes:
    """All that decides the read order of a split."""

    first_window: int
    context: int
    shard_windows: int
    chunk_windows: int  # windows that lie in one chunk of residuals: no read is smaller
    trainable: np.ndarray  # int64 [windows of the split], tokens that are not special
    document_tokens: np.ndarray  # int64 [documents of the split], their trainable tokens
    document_windows: np.ndarray  # int64 [documents that begin a window], how many they begin

    @property
    def windows(self) -> int:
        return len(self.trainable)

    @property
    def tokens(self) -> int:
        return int(self.trainable.sum())


def measure_split(store: Store, split: str) -> SplitSizes:
    """Count the trainable tokens of every window and every document of a split."""
    manifest = store.manifest
    counts, documents, beginnings = [], [], []
    for arrays in store.stream(Request(tokens=True, documents=True, split=split)):
        assert arrays.tokens is not None and arrays.documents is not None
        trains_WT = trainable(manifest, arrays.tokens)
        counts.append(trains_WT.sum(axis=1, dtype=np.int64))
        documents.append(_count_runs(arrays.documents[trains_WT]))
        beginnings.append(_count_runs(arrays.documents[:, 0]))
    return SplitSizes(
        first_window=manifest.splits[split][0],
        context=manifest.context,
        shard_windows=manifest.shard_windows,
        chunk_windows=chunk_windows(manifest),
        trainable=np.concatenate([np.zeros(0, np.int64), *counts]),
        document_tokens=_merge_counts(documents),
        document_windows=_merge_counts(beginnings),
    )


def trainable(manifest: Manifest, tokens: np.ndarray) -> np.ndarray:
    """bool, like `tokens`: which of them may train an SAE."""
    return ~is_special(tokens, manifest.model.special_tokens)


def chunk_windows(manifest: Manifest) -> int:
    """Windows in one chunk of residuals."""
    return arrays_of(manifest)[manifest.sites[0].path].chunks[0] if manifest.sites else manifest.shard_windows


def _count_runs(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids with their counts. Ids come in long runs, so runs are counted and not tokens."""
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])) if len(ids) else np.zeros(0, np.int64)
    lengths = np.diff(np.concatenate([starts, [len(ids)]]))
    return _add_up(ids[starts], lengths)


def _merge_counts(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    if not parts:
        return np.zeros(0, np.int64)
    ids, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _add_up(ids, counts)[1]


def _add_up(ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distinct, place = np.unique(ids, return_inverse=True)
    return distinct, np.bincount(place, weights=counts, minlength=len(distinct)).astype(np.int64)
