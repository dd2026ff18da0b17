"""Massive activations: the few rows whose norm is so far beyond all others that they dominate every sum of squares.

On SmolLM2-135M 0.03 % of ordinary tokens carry two thirds of the squared norm after layer 15. A row is massive if
its norm exceeds a multiple of the layer's median norm; the median does not move however large they are.

Norms are measured here, from the residuals, and recorded nowhere: a store of any age and origin is measured the same
way, by every reader, to the same bits. At most `SAMPLE_BYTES` of a layer are read, spread evenly over the store: the
median and the moments of a million rows are exact enough for every use. Whole shards are read if several fit, else
parts of many shards, because a store's text may be ordered by source. `sae-store info` reads only `FEW_BYTES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .layout import arrays_of
from .manifest import Manifest
from .moments import Moments
from .reader import Store
from .requests_and_spans import Request, ShardArrays, Span
from .sites import Place, Site, site_of
from .stored_dtypes import FP8_VALUES
from .token_counts_and_summary import trainable

MULTIPLE = 10.0
"""The default multiple of the median norm."""
KEEP = "keep_massive"  # in the settings of an imported corpus: every row counts, by choice of the importer
SAMPLE_BYTES = 2**30
SEVERAL, PARTS = 3, 32  # whole shards that are enough, and parts read if fewer shards fit
FEW_BYTES, FEW_SHARDS = 2**26, 4
BLOCK_ROWS = 512  # converted to float32 at a time: they stay in a processor's cache


@dataclass(frozen=True)
class Massive:
    """The massive rows found in one layer. Special tokens do not count as rows."""

    multiple: float
    median: float  # of the norms
    rows: int  # read
    massive: int  # of these rows
    square_share: float  # the massive rows' share of the sum of all squared norms
    rms_norm: float  # of all rows
    shards: int  # read
    shards_in_store: int
    in_parts: bool  # whether some of these shards were read only in part
    ordinary: Moments  # of the other rows, without norms by position; the mean only on request

    @property
    def bound(self) -> float:
        """The largest norm that is not massive."""
        return self.multiple * self.median

    def __str__(self) -> str:
        sampled = f" in {'parts of ' if self.in_parts else ''}{self.shards} of {self.shards_in_store} shards"
        sampled = sampled if self.in_parts or self.shards < self.shards_in_store else ""
        return (
            f"{self.massive:,} of {self.rows:,} tokens{sampled} ({self.massive / max(self.rows, 1):.3%}) have a norm "
            f"beyond {self.multiple:g} times the median of {self.median:,.4g}, "
            f"and {self.square_share:.1%} of all squared norm"
        )


def default_multiple(manifest: Manifest) -> float | None:
    """The multiple for a store if none was given; None: every row counts."""
    return None if manifest.corpus.settings.get(KEEP) else MULTIPLE


def is_massive(norms: Any, bound: Any) -> Any:
    """bool, like `norms`, an array or a tensor. False for norms that are not finite: results must show such damage."""
    return (norms > bound) & (norms < math.inf)


def row_norms(stored: np.ndarray, dtype: str, scales: np.ndarray | None = None) -> np.ndarray:
    """float32 [...]: the norms of residuals [..., D] as stored, with their `scales` [...], if any."""
    rows = stored.reshape(-1, stored.shape[-1])
    norms = np.empty(len(rows), np.float32)
    for start, block in _float_blocks(rows, dtype):
        np.einsum("nd,nd->n", block, block, out=norms[start : start + len(block)])
    norms = np.sqrt(norms, out=norms).reshape(stored.shape[:-1])
    return norms if scales is None else np.multiply(norms, scales, out=norms)


def measure_massive(
    store: Store, layer: Place, multiple: float, spans: list[Span] | None = None, *, with_mean: bool = True
) -> Massive:
    """The massive rows of a layer and the moments of the others, over `spans` or else a `sample`. The mean requires a
    second read of everything."""
    manifest = store.manifest
    spans = sample(manifest, layer, store.committed) if spans is None else spans
    # Each span's norms, and which of them count: few bytes compared with the residuals.
    norms = [(_norms(part, site_of(layer)), counts_WT) for part, counts_WT in _read(store, layer, spans)]
    seen = np.concatenate([np.zeros(0, np.float32), *(norms_WT[counts_WT] for norms_WT, counts_WT in norms)])
    seen = seen[np.isfinite(seen)].astype(np.float64)
    median = float(np.median(seen)) if len(seen) else 0.0
    massive = is_massive(seen, multiple * median)
    ordinary_WT = [counts_WT & (norms_WT <= multiple * median) for norms_WT, counts_WT in norms]
    ordinary, squares = seen[~massive], np.square(seen)
    count = max(len(ordinary), 1)
    return Massive(
        multiple=multiple,
        median=median,
        rows=len(seen),
        massive=int(massive.sum()),
        square_share=float(squares[massive].sum() / squares.sum()) if squares.any() else 0.0,
        rms_norm=float(squares.mean()) ** 0.5 if len(seen) else 0.0,
        shards=len({span.shard for span in spans}),
        shards_in_store=manifest.shards,
        in_parts=any((span.start, span.stop) != manifest.shard_range(span.shard) for span in spans),
        ordinary=Moments(
            count=len(ordinary),
            mean=_sum_of(store, layer, spans, ordinary_WT) / count if with_mean else np.zeros(0),
            mean_norm=float(ordinary.sum()) / count,
            mean_square_norm=float(squares[~massive].sum()) / count,
            windows=0,
            norm_by_position=np.zeros(0),
        ),
    )


def count_ordinary(store: Store, bounds: Mapping[Place, float], split: str, windows: int, enough: int) -> int:
    """Count tokens of a split's first windows, neither special nor massive in any of `bounds`; stop at `enough`."""
    manifest, found = store.manifest, 0
    request = Request.of(map(site_of, bounds), tokens=True, split=split, windows=(0, windows))
    chunk = max(map(store.chunk_windows, request.sites), default=manifest.shard_windows)
    spans = [part for span in store.spans(request) for part in span.cut(chunk, manifest.shard_windows)]
    for part in store.stream(request, spans, in_flight=1):
        assert part.tokens is not None
        counts = trainable(manifest, part.tokens)
        for layer, bound in bounds.items():
            counts &= ~is_massive(_norms(part, site_of(layer)), bound)
        found += int(counts.sum())
        if found >= enough:
            break
    return found


def sample(manifest: Manifest, layer: Place, committed: np.ndarray) -> list[Span]:
    """Whole committed shards, spread evenly, or parts of them if fewer than `SEVERAL` fit into `SAMPLE_BYTES`."""
    most, shards = _windows_in(SAMPLE_BYTES, manifest, layer), np.flatnonzero(committed)
    if most >= SEVERAL * manifest.shard_windows or not len(shards):
        return sample_whole(manifest, layer, committed)
    start, stop = manifest.shard_range(int(shards[-1]))  # only the last shard of a store can be shorter
    if most >= (len(shards) - 1) * manifest.shard_windows + stop - start:
        return spread(manifest, committed, len(shards))
    chunk = arrays_of(manifest)[site_of(layer).path].chunks[0]
    part_windows = max(chunk, most // PARTS // chunk * chunk)
    per_shard = -(-manifest.shard_windows // part_windows)
    parts = np.arange((len(shards) - 1) * per_shard - (start - stop) // part_windows)
    spans = []
    for part in _evenly(parts, max(FEW_SHARDS, min(PARTS, most // part_windows))).tolist():
        shard = int(shards[part // per_shard])
        start, stop = manifest.shard_range(shard)
        start += part % per_shard * part_windows
        spans.append(Span(shard, start, min(start + part_windows, stop)))
    return spans


def sample_whole(manifest: Manifest, layer: Place, committed: np.ndarray) -> list[Span]:
    """Whole committed shards, however few fit: the sample of runs started by versions that read no parts."""
    return spread(manifest, committed, max(1, _windows_in(SAMPLE_BYTES, manifest, layer) // manifest.shard_windows))


def sample_few(manifest: Manifest, layer: Place, committed: np.ndarray) -> list[Span]:
    """Whole shards, or the first windows of a few shards if whole ones would exceed `FEW_BYTES`."""
    most = _windows_in(FEW_BYTES, manifest, layer)
    spans = spread(manifest, committed, max(FEW_SHARDS, most // manifest.shard_windows))
    windows = max(1, most // max(1, len(spans)))
    return [replace(span, stop=min(span.stop, span.start + windows)) for span in spans]


def spread(manifest: Manifest, committed: np.ndarray, most: int) -> list[Span]:
    """At most `most` whole committed shards, spread evenly."""
    shards = _evenly(np.flatnonzero(committed), most)
    return [Span(shard, *manifest.shard_range(shard)) for shard in shards.tolist()]


def _evenly(numbers: np.ndarray, most: int) -> np.ndarray:
    return numbers if len(numbers) <= most else numbers[np.linspace(0, len(numbers) - 1, most).round().astype(int)]


def _windows_in(size: int, manifest: Manifest, layer: Place) -> int:
    """The number of a layer's windows that fit into `size` bytes."""
    row = arrays_of(manifest)[site_of(layer).path]
    return size // (manifest.context * row.shape[-1] * row.dtype.itemsize)


def _sum_of(store: Store, layer: Place, spans: list[Span], counts: list[np.ndarray]) -> np.ndarray:
    """float64 [D]: the sum of the rows of each span that count."""
    site = site_of(layer)
    total = np.zeros(store.manifest.width_of(site.hook))
    for (part, _), counts_WT in zip(_read(store, layer, spans), counts, strict=True):
        stored, scales, counts_N = part.at(site), part.scales.get(site), counts_WT.ravel()
        for start, block in _float_blocks(stored.reshape(-1, stored.shape[-1]), part.dtype):
            if scales is not None:
                block *= scales.ravel()[start : start + len(block), None]
            total += block[counts_N[start : start + len(block)]].sum(axis=0, dtype=np.float64)
    return total


def _norms(part: ShardArrays, site: Site) -> np.ndarray:
    """float32 [W, T]"""
    return row_norms(part.at(site), part.dtype, part.scales.get(site))


def _read(store: Store, layer: Place, spans: list[Span]) -> Iterator[tuple[ShardArrays, np.ndarray]]:
    """Each span's residuals, and a mask bool [W, T] of its tokens that are not special; valid until the next."""
    for arrays in store.stream(Request.of([site_of(layer)], tokens=True), spans, in_flight=1):
        assert arrays.tokens is not None
        yield arrays, trainable(store.manifest, arrays.tokens)


def _float_blocks(rows: np.ndarray, dtype: str) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of rows as float32, each with the number of its first row; valid until the next."""
    held = np.empty((min(BLOCK_ROWS, len(rows)), rows.shape[1]), np.uint32 if dtype == "bfloat16" else np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        part = rows[start : start + BLOCK_ROWS]
        block = held[: len(part)]
        if dtype == "fp8":
            np.take(FP8_VALUES, part, out=block)
        else:
            np.copyto(block, part)
        if dtype == "bfloat16":
            np.left_shift(block, 16, out=block)
        yield start, block.view(np.float32)
