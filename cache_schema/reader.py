"""Read a store: open it, ask for arrays, get them shard by shard.

Opening reads the root document and the commit index, nothing else. Chunks are read straight into the caller's memory,
all in flight at once, with every checksum verified; `stream` reads ahead, so that a consumer never waits for a disk
that is fast enough.
"""

from __future__ import annotations

import os
import shlex
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice

import numpy as np
import zarr

from .commits import CommitRecord, find_committed, read_in_order, read_record
from .csr import AttentionCsr
from .disk_and_cloud_files import Files, LocalFiles, open_files
from .encode_and_read_chunks import plan_reads, read_chunk, read_with_zarr
from .errors import CsrInvalid, ManifestInvalid, ShardCorrupt, StoreMismatch, StoreUnfinished
from .layout import (
    ATTENTION_PARTS,
    BEGINNING,
    arrays_of,
    attention_path,
    is_line,
    moment_columns,
    moments_path,
    scales_path,
)
from .manifest import Manifest
from .moments import Moments, from_line, merge
from .open_and_check_root import read_root, require_not_replaced
from .requests_and_spans import Request, ShardArrays, Span, spans_of, validate_request, validate_span
from .sites import RESID, Site, by_hook
from .token_counts_and_summary import Counts, SplitCounts, Summary, count_split, read_counts, read_summary

READERS = 4  # local chunks in flight: one waits for the disk while another is checked
CANNOT_HARVEST_AGAIN = (
    "Shards are harvested from their tokens and documents, so these cannot be harvested again: "
    "restore their files from a copy, or harvest the corpus into a new store"
)
REMOTE_READERS = 16  # an object store answers slowly but many at once


def shard_memory(manifest: Manifest, request: Request, windows: int | None = None) -> dict[str, np.ndarray]:
    """Reusable memory for each array of a request, by path, large enough for any span of a shard or of `windows`."""
    validate_request(manifest, request)
    paths = [path for path, wanted in zip(BEGINNING, (request.tokens, request.documents), strict=True) if wanted]
    paths += [site.path for site in request.sites]
    if manifest.stored_as:
        paths += [scales_path(site) for site in request.sites]
    paths += [attention_path(layer, part) for layer in request.attention_layers for part in ATTENTION_PARTS]
    layouts, windows = arrays_of(manifest), windows or manifest.shard_windows
    shapes = {path: (1 if is_line(path) else windows, *layouts[path].shape[1:]) for path in paths}
    return {path: np.empty(shape, layouts[path].dtype) for path, shape in shapes.items()}


class Store:
    """A store opened for reading. Thread-safe, except that each caller needs a `stream` of its own."""

    def __init__(self, place: Files | str | os.PathLike[str], *, via_zarr: bool = False) -> None:
        self.files = files = open_files(place) if isinstance(place, (str, os.PathLike)) else place
        self._root = root = read_root(files)
        self.manifest = root.manifest
        self.committed = find_committed(files, self.manifest)
        self._layouts = dict.fromkeys(root.arrays) if via_zarr else root.arrays
        self._pool: ThreadPoolExecutor | None = None
        self._zarr_root: zarr.Group | None = None

    @classmethod
    def open(cls, url: str | os.PathLike[str], *, expect_cache_id: str | None = None, via_zarr: bool = False) -> Store:
        """Open the store at a path or fsspec URL. `via_zarr` reads through zarr itself: slower, but the same bytes."""
        store = cls(url, via_zarr=via_zarr)
        if expect_cache_id is not None and store.manifest.cache_id != expect_cache_id:
            raise StoreMismatch(
                f"expected the store with cache id {expect_cache_id} at {store.url}, found {store.manifest.cache_id}. "
                "Give the path of the store used before"
            )
        return store

    @property
    def url(self) -> str:
        return self.files.url

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def spans(self, request: Request) -> list[Span]:
        """The request cut at shard borders; raises if a shard is not committed yet."""
        validate_request(self.manifest, request)
        spans = spans_of(self.manifest, request)
        self._require_committed(spans)
        return spans

    def read(self, request: Request, span: Span, out: Mapping[str, np.ndarray] | None = None) -> ShardArrays:
        """The arrays of one span, as views into `out` (see `shard_memory`) or into new memory."""
        return self._begin(request, span, shard_memory(self.manifest, request) if out is None else out).finish()

    def stream(
        self, request: Request, order: Sequence[Span] | None = None, in_flight: int = 2
    ) -> Iterator[ShardArrays]:
        """The arrays of many spans. Each is valid until the next is asked for: its memory is reused."""
        spans = deque(self.spans(request) if order is None else order)
        room = min(in_flight, len(spans)) + 1
        windows = max((span.windows for span in spans), default=0)
        free: list[Mapping[str, np.ndarray]] = [shard_memory(self.manifest, request, windows) for _ in range(room)]
        running: deque[_Reading] = deque()
        try:
            while spans or running:
                while spans and free:
                    running.append(self._begin(request, spans.popleft(), free.pop()))
                reading = running.popleft()
                found = reading.finish()
                if not running or running[0].span.shard != reading.span.shard:  # costs a request, so once per shard
                    self.require_not_replaced()
                yield found
                free.append(reading.memory)
        finally:
            for reading in running:
                reading.cancel()

    def require_not_replaced(self) -> None:
        """Refuse a store that has been replaced since it was opened. `stream` checks after each shard, and any failed
        read checks; callers of `read` check once they have read enough to be worth a request."""
        require_not_replaced(self.files, self._root)

    def chunk_windows(self, site: Site) -> int:
        """Windows per chunk of activations in this store, which another tool may have rechunked."""
        layout = self._layouts[site.path]
        return layout.chunks[0] if layout else self.manifest.shard_windows

    def beginning(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and documents of a shard, committed or not: all are written before the first shard."""
        tokens, documents = (self.read_beginning(path, shard) for path in BEGINNING)
        return tokens, documents

    def ids(self, span: Span) -> tuple[np.ndarray, np.ndarray]:
        first, _ = self.manifest.shard_range(span.shard)
        tokens, documents = self.beginning(span.shard)
        part = slice(span.start - first, span.stop - first)
        return tokens[part], documents[part]

    def counts(self, split: str) -> tuple[np.ndarray, SplitCounts]:
        """The number of trainable tokens per window (int64 [windows of the split]), and the split's totals."""
        spans = self.spans(Request(tokens=True, split=split))
        found = self._counts
        if found is None:
            return count_split(self.manifest, map(self.ids, spans))
        return np.array(found.trainable[slice(*self.manifest.splits[split])], np.int64), found.splits[split]

    @cached_property
    def _summary(self) -> Summary | None:
        return read_summary(self.files, self.manifest)  # of all layers: 20 MB for 80 of a large model

    @cached_property
    def _counts(self) -> Counts | None:
        return read_counts(self.files, self.manifest)

    def read_beginning(self, path: str, shard: int) -> np.ndarray:
        """Tokens or documents of a shard, by the array's path."""
        start, stop = self.manifest.shard_range(shard)
        values = np.empty((stop - start, self.manifest.context), "<u4")
        for job in self._jobs(path, start, stop, values):
            self._run(job, shard, path)
        return values

    def record(self, shard: int) -> CommitRecord:
        return read_record(self.files, self.manifest, shard)

    def moments(self, layer: int, hook: str = RESID) -> Moments:
        """Moments of a layer over the whole store; the same bits whatever order the shards were written in."""
        validate_request(self.manifest, Request.of([Site(hook, layer)]))
        if not self.committed.all():
            missing = int((~self.committed).sum())
            raise StoreUnfinished(
                f"not committed: {missing} of {self.manifest.shards} shards of {self.url}, so its statistics are not "
                "final. Finish the import or harvest: the same command resumes where it stopped"
            )
        if self._summary is not None:
            return self._summary.moments(layer, hook)
        return self.merged_moments([Site(hook, layer)])[Site(hook, layer)]

    def merged_moments(self, sites: Sequence[Site]) -> dict[Site, Moments]:
        """Moments of these places, from the lines of all shards in order."""
        pairs = ((site, shard) for site in sites for shard in range(self.manifest.shards))
        lines = read_in_order(lambda pair: self.shard_moments(pair[0].layer, pair[1], pair[0].hook), pairs)
        return {site: merge(islice(lines, self.manifest.shards)) for site in sites}

    def shard_moments(self, layer: int, shard: int, hook: str = RESID) -> Moments:
        """Moments of a layer over one shard."""
        _, length = moment_columns(self.manifest.context, self.manifest.width_of(hook))["mean"]
        line, path = np.empty((1, length), np.float64), moments_path(layer, hook)
        for job in self._jobs(path, shard, shard + 1, line):
            self._run(job, shard, path)
        try:
            return from_line(line[0], self.manifest.context)
        except ShardCorrupt as error:
            raise self._damage(shard, path, error) from None

    def _require_committed(self, spans: Sequence[Span]) -> None:
        """Refuse shards without a record: they do not exist, even if their chunks are already there."""
        missing = [span.shard for span in spans if not self.committed[span.shard]]
        if missing:
            raise StoreUnfinished(
                f"not committed: {len(missing)} of the {len(spans)} shards asked for of {self.url}, the first is shard "
                f"{missing[0]}. Finish the import or harvest: the same command resumes where it stopped"
            )

    def _begin(self, request: Request, span: Span, memory: Mapping[str, np.ndarray]) -> _Reading:
        """Start reading every chunk of a span."""
        validate_request(self.manifest, request)
        validate_span(self.manifest, span)
        self._require_committed([span])
        is_whole = (span.start, span.stop) == self.manifest.shard_range(span.shard)
        futures: dict[str, list[Future[None]]] = {}
        for path in sorted(memory, key=lambda path: not path.endswith("/indptr")):  # other lines wait for it
            start, stop = (span.shard, span.shard + 1) if is_line(path) else (span.start, span.stop)
            if is_line(path) and not is_whole and self._layouts[path] is not None:
                jobs = [partial(self._read_part_of_line, path, span, memory, futures)]
            else:
                jobs = self._jobs(path, start, stop, memory[path][: stop - start])
            futures[path] = [self._executor().submit(self._run, job, span.shard, path) for job in jobs]
        return _Reading(self, request, span, memory, [future for found in futures.values() for future in found])

    def _read_part_of_line(
        self, path: str, span: Span, memory: Mapping[str, np.ndarray], running: Mapping[str, list[Future[None]]]
    ) -> None:
        """Read a span's part of a line of attention into its place."""
        layout, line, pointers = self._layouts[path], memory[path][0], f"{path.rpartition('/')[0]}/indptr"
        assert layout is not None
        rows = self.manifest.attention.heads * self.manifest.context
        first, last = ((window - span.shard * self.manifest.shard_windows) * rows for window in (span.start, span.stop))
        if path == pointers:
            part = slice(first, last + 1)
        else:
            for future in running[pointers]:
                future.result()
            indptr = memory[pointers][0]
            part = slice(*(min(int(indptr[row]), len(line)) for row in (first, last)))  # `_attention` checks them
        index, row = divmod(span.shard, layout.chunks[0])
        read_chunk(self.files, layout, index, row * layout.shape[1] + part.start, line[part])

    def _jobs(self, path: str, start: int, stop: int, out: np.ndarray) -> list[Callable[[], None]]:
        """One call per chunk; each fills its part of `out`."""
        layout = self._layouts[path]
        if layout is not None:
            return [partial(read_chunk, self.files, layout, *read) for read in plan_reads(layout, start, stop, out)]
        return [partial(read_with_zarr, self._zarr_array(path), self.files, path, start, stop, out)]

    def _run(self, job: Callable[[], None], shard: int, path: str) -> None:
        """Run a job; add place and remedy to any damage it finds."""
        try:
            job()
        except ShardCorrupt as error:
            raise self._damage(shard, path, error) from None

    def _damage(self, shard: int, path: str, error: ShardCorrupt) -> ShardCorrupt:
        self.require_not_replaced()
        url = shlex.quote(self.url)
        remedy = CANNOT_HARVEST_AGAIN if path in BEGINNING else f"`sae-store repair {url}` repairs it"
        return type(error)(f"shard {shard}, array {path}: {error}. `sae-store verify {url}` lists all damage. {remedy}")

    def _executor(self) -> ThreadPoolExecutor:
        if self._pool is None:
            readers = READERS if isinstance(self.files, LocalFiles) else REMOTE_READERS
            self._pool = ThreadPoolExecutor(readers, thread_name_prefix="saemill-read")
        return self._pool

    def _zarr_array(self, path: str) -> zarr.Array:
        """Open an array with zarr, which parses the documents itself and raises many kinds of errors."""
        try:
            if self._zarr_root is None:
                self._zarr_root = zarr.open_group(self.url, mode="r")
            found = self._zarr_root[path]
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ManifestInvalid(
                f"zarr cannot open array {path} of {self.url} ({error!r}). Restore its zarr.json: "
                f"`sae-store repair {shlex.quote(self.url)}` rewrites it"
            ) from None
        if not isinstance(found, zarr.Array):
            raise ManifestInvalid(f"expected {path} of {self.url} to be an array, found a group. Restore its zarr.json")
        return found


@dataclass
class _Reading:
    """A span that is being read into memory."""

    store: Store
    request: Request
    span: Span
    memory: Mapping[str, np.ndarray]
    futures: list[Future[None]]

    def finish(self) -> ShardArrays:
        """Wait for every chunk; raise the first damage found once nothing is in flight."""
        wait(self.futures)
        for future in self.futures:
            future.result()
        windows, arrays = self.span.windows, self.memory
        manifest = self.store.manifest
        return ShardArrays(
            span=self.span,
            tokens=arrays["tokens"][:windows] if self.request.tokens else None,
            documents=arrays["documents"][:windows] if self.request.documents else None,
            acts={
                hook: {layer: arrays[Site(hook, layer).path][:windows] for layer in layers}
                for hook, layers in by_hook(self.request.sites).items()
            },
            attention={layer: self._attention(layer) for layer in self.request.attention_layers},
            scales={site: arrays[scales_path(site)][:windows] for site in self.request.sites if manifest.stored_as},
            dtype=manifest.stored_dtype,
        )

    def cancel(self) -> None:
        for future in self.futures:
            future.cancel()
        wait(self.futures)

    def _attention(self, layer: int) -> AttentionCsr:
        """The span's rows from the shard's lines, checked against the rules of the layout."""
        manifest, windows = self.store.manifest, self.span.windows
        indptr, indices, data, kept_mass = (self.memory[attention_path(layer, part)] for part in ATTENTION_PARTS)
        whole = AttentionCsr(indptr[0], indices[0], data[0], kept_mass)
        first = self.span.start - self.span.shard * manifest.shard_windows
        csr = replace(whole.slice(first, first + windows), kept_mass=kept_mass[:windows])  # which has no other windows
        try:
            if first == 0 and (begin := whole.indptr[0]):
                raise CsrInvalid(f"expected the first row to start at entry 0, found {begin}: a gap at the start")
            csr.validate(manifest.attention.topk, manifest.attention.causal, "attention rows")
        except CsrInvalid as error:
            raise self.store._damage(self.span.shard, attention_path(layer, "indptr"), error) from None
        return csr
