"""Derived files in a store, which spare readers from reading all of it first.

stats/counts.json: the number of trainable tokens in each window. Derived from tokens and documents and written with
them. Older stores lack it: a reader then counts the tokens and gets the same numbers. Special tokens are never counted.

stats/summary.json: the moments and kept mass of a finished store, merged once, in shard order. Derived from the lines
under stats/ and from the index; without it a reader merges the lines and gets the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .commits import REBUILD_HINT, read_checked
from .disk_and_cloud_files import Files
from .errors import ManifestInvalid
from .layout import COUNTS, SUMMARY, encode_json
from .manifest import Manifest
from .moments import Moments, is_special
from .requests_and_spans import Request, Span, spans_of
from .sites import RESID, Site
from .strict_json import LATER, to_json

Ids = tuple[np.ndarray, np.ndarray]
"""Tokens and documents [W, T] of some windows."""


@dataclass(frozen=True)
class SplitCounts:
    tokens: int  # trainable
    same_document: float  # the chance that two of them share a document
    same_first_document: float  # the chance that two windows start in the same document


@dataclass(frozen=True)
class Counts:
    cache_id: str
    trainable: tuple[int, ...]  # of each window
    splits: dict[str, SplitCounts]
    format: int = 1


def trainable(manifest: Manifest, tokens: np.ndarray) -> np.ndarray:
    """bool, like `tokens`: which of them may train an SAE."""
    return ~is_special(tokens, manifest.model.special_tokens)


def count_split(manifest: Manifest, parts: Iterable[Ids]) -> tuple[np.ndarray, SplitCounts]:
    """Trainable tokens of each window (int64 [windows]), and the split's counts."""
    counts, documents, beginnings = [np.zeros(0, np.int64)], [], []
    for tokens, ids in parts:
        trains_WT = trainable(manifest, tokens)
        counts.append(trains_WT.sum(axis=1, dtype=np.int64))
        documents.append(_count_runs(ids[trains_WT]))
        beginnings.append(_count_runs(ids[:, 0]))
    every = np.concatenate(counts)
    return every, SplitCounts(int(every.sum()), pair_share(_merged(documents)), pair_share(_merged(beginnings)))


def count_all(manifest: Manifest, read: Callable[[Span], Ids]) -> Counts:
    """The counts of all splits; `read` returns the tokens and documents of a span."""
    every, splits = [], {}
    for split in manifest.splits:
        counts, splits[split] = count_split(manifest, map(read, spans_of(manifest, Request(split=split))))
        every.append(counts)
    return Counts(manifest.cache_id, tuple(np.concatenate(every).tolist()), splits)


def pair_share(group_sizes: np.ndarray) -> float:
    """The chance that two members drawn at random without replacement are in the same group."""
    sizes = group_sizes.astype(np.float64)
    total = sizes.sum()
    return float((sizes * (sizes - 1)).sum() / (total * (total - 1))) if total > 1 else 0.0


def read_counts(files: Files, manifest: Manifest) -> Counts | None:
    found = read_checked(Counts, files, manifest, COUNTS)
    if found is None:
        return None
    counts, where = found
    if len(counts.trainable) != manifest.windows:
        raise ManifestInvalid(
            f"{where}: expected {manifest.windows} windows, found {len(counts.trainable)}. {REBUILD_HINT}"
        )
    if not 0 <= min(counts.trainable, default=0) <= max(counts.trainable, default=0) <= manifest.context:
        raise ManifestInvalid(f"{where}: expected 0 to {manifest.context} tokens in each window. {REBUILD_HINT}")
    for split, (start, stop) in manifest.splits.items():
        tokens, total = sum(counts.trainable[start:stop]), counts.splits.get(split)
        if total is None or tokens != total.tokens:
            raise ManifestInvalid(
                f"{where}: expected {total and total.tokens} tokens in the windows of {split}, found {tokens}. "
                f"{REBUILD_HINT}"
            )
    return counts


def write_counts(files: Files, counts: Counts) -> None:
    files.replace(COUNTS, encode_json(to_json(counts), indent=None))


def _count_runs(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids with their counts. Ids come in long runs, so runs are counted, not tokens."""
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])) if len(ids) else np.zeros(0, np.int64)
    lengths = np.diff(np.concatenate([starts, [len(ids)]]))
    return _add_up(ids[starts], lengths)


def _merged(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    if not parts:
        return np.zeros(0, np.int64)
    ids, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _add_up(ids, counts)[1]


def _add_up(ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distinct, place = np.unique(ids, return_inverse=True)
    return distinct, np.bincount(place, weights=counts, minlength=len(distinct)).astype(np.int64)


@dataclass(frozen=True)
class LayerSummary:
    """The fields of `Moments` for a hook in one layer, in the order of the JSON file."""

    count: int
    mean_norm: float
    mean_square_norm: float
    windows: int
    norm_by_position: tuple[float, ...]
    mean: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """Statistics of a finished store, by layer."""

    cache_id: str
    resid: dict[int, LayerSummary]
    kept_mass: dict[int, float]  # mean over all attention rows
    entries_per_row: dict[int, float]
    hooks: dict[str, dict[int, LayerSummary]] = field(default_factory=dict, metadata={LATER: True})
    format: int = 1

    @property
    def sites(self) -> dict[Site, LayerSummary]:
        by_hook = {RESID: self.resid} | self.hooks
        return {Site(hook, layer): found for hook, layers in by_hook.items() for layer, found in layers.items()}

    def moments(self, layer: int, hook: str = RESID) -> Moments:
        fields = vars(self.sites[Site(hook, layer)]).items()
        found: dict[str, Any] = {name: np.array(it) if isinstance(it, tuple) else it for name, it in fields}
        return Moments(**found)


def summarise(moments: Moments) -> LayerSummary:
    fields = vars(moments).items()
    found: dict[str, Any] = {name: tuple(it.tolist()) if isinstance(it, np.ndarray) else it for name, it in fields}
    return LayerSummary(**found)


def read_summary(files: Files, manifest: Manifest) -> Summary | None:
    opened = read_checked(Summary, files, manifest, SUMMARY)
    if opened is None:
        return None
    summary, where = opened
    lengths = {site: (manifest.context, manifest.width_of(site.hook)) for site in manifest.sites}
    found = {site: (len(moments.norm_by_position), len(moments.mean)) for site, moments in summary.sites.items()}
    if found != lengths:
        raise ManifestInvalid(f"{where}: expected layers, positions and widths of this store. {REBUILD_HINT}")
    return summary
