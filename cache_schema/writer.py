"""Write a store: all tokens first, then shards in any order, each committed by its record.

The root document is written after all tokens: without it there is no store. A shard's record is written once its
chunks are flushed: a kill at any instant leaves either the whole shard or none of it. No stored byte depends on who
writes it, when, or in which order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager, suppress

import numpy as np

from .commits import CommitRecord, DeviceRecord, Index, compact, find_committed, write_device, write_record
from .disk_and_cloud_files import Files, LocalFiles, open_files, read_if_there
from .encode_and_read_chunks import CHECKSUM_BYTES, encode
from .errors import ManifestInvalid, ShardCorrupt, ShardInvalid, StoreBusy
from .layout import (
    BEGINNING,
    COUNTS,
    ROOT,
    SUMMARY,
    ArrayLayout,
    arrays_of,
    documents_of,
    encode_json,
    find_too_large,
    record_key,
    root_document,
)
from .manifest import Manifest, require_same, seal
from .open_and_check_root import has_root, read_root, require_writable
from .reader import Store
from .shard_claims import CREATION, open_claims
from .shard_content import ShardContent, ShardPart, as_stored, lay_out, make_record, validate_content
from .sites import RESID
from .stored_dtypes import why_not_uint32
from .strict_json import to_json
from .token_counts_and_summary import LayerSummary, Summary, count_all, read_summary, summarise, write_counts

WRITERS = 4  # chunks in flight: enough to overlap compression, checksums and the disk
REMOTE_WRITERS = 16  # an object store answers slowly but many at once
QUEUED = 4096  # chunks of tokens that wait for a writer at one time: a store may have millions
COMPACT_EVERY = 64  # about one shard in 64 brings the index up to date, whoever writes it
MOST_COMPACTIONS = 1000  # per store: each looks for every missing record, which is slow with many thousand shards


class StoreWriter:
    """Writes one store. Made by `create` or `open`; must be closed."""

    def __init__(self, files: Files, manifest: Manifest) -> None:
        self.files = files
        self.manifest = manifest
        self.arrays = arrays_of(manifest)
        self._claims = open_claims(files)
        writers = WRITERS if isinstance(files, LocalFiles) else REMOTE_WRITERS
        self._pool = ThreadPoolExecutor(writers, thread_name_prefix="saemill-write")

    @classmethod
    def create(
        cls, url: str | os.PathLike[str], manifest: Manifest, tokens: np.ndarray, documents: np.ndarray
    ) -> StoreWriter:
        """Start a store, or resume one with the same settings."""
        files, manifest = open_files(url), seal(manifest)
        if found := find_too_large(manifest):
            problem, is_window = found
            short = f"windows shorter than {manifest.context} tokens"
            few = f"shards of fewer windows than {manifest.shard_windows}"
            raise ManifestInvalid(f"{problem}. Make {short if is_window else few}")
        _validate_tokens(manifest, tokens, documents)
        writer = cls(files, manifest)
        try:
            writer._begin(tokens, documents)
        except BaseException:
            writer._release()
            raise
        return writer

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> StoreWriter:
        files = open_files(url)
        root = read_root(files)
        require_writable(files.url, root)
        return cls(files, root.manifest)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def if_killed(self) -> str:
        """For messages about a held shard: when it becomes free if its writer was killed."""
        return self._claims.if_killed

    def pending(self) -> list[int]:
        """Shards without a record, in rising order."""
        return np.flatnonzero(~find_committed(self.files, self.manifest)).tolist()

    def left(self) -> tuple[list[int], int]:
        """The pending shards worth trying now, and the number of all pending ones."""
        pending = self.pending()
        return self._claims.worth_trying(pending), len(pending)

    @contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """Hold a shard; yields False if another writer holds it or has committed it."""
        if not self._claims.take(shard):
            yield False
            return
        try:
            yield read_if_there(self.files, record_key(shard)) is None
        finally:
            self._claims.release(shard)

    def write(self, shard: int, content: ShardContent, device: DeviceRecord | None = None) -> CommitRecord | None:
        """Write a claimed shard and commit it; `device` is the one that computed it.

        Returns None and writes nothing if the claim has lapsed and another writer has it: that writer may have
        committed the shard already, and another device computes other bytes.
        """
        validate_content(self.manifest, shard, content)
        if not self._claims.keeps(shard):
            return None
        content = as_stored(self.manifest, content)
        parts = lay_out(self.manifest, shard, content)
        sizes = {path: self._size_of(self.arrays[path], shard) for path in BEGINNING}
        sizes |= {part.layout.path: 0 for part in parts}
        tasks = [(part, at) for part in parts for at in range(part.num_chunks)]
        for (part, _), size in zip(tasks, self._write_chunks(tasks), strict=True):
            sizes[part.layout.path] += size
        self.files.settle(part.layout.path for part in parts)
        record = make_record(self.manifest, shard, content, sizes)
        if device is not None:
            write_device(self.files, shard, device)
        write_record(self.files, record)
        if compacts_after(shard, self.manifest.shards):
            with self._claims.hold_derived() as holds_claim:
                compact(self.files, self.manifest, holds_claim)
        return record

    def _write_chunks(self, tasks: Sequence[tuple[ShardPart, int]]) -> list[int]:
        """Write all chunks; if one fails, wait until nothing is in flight, so that the claim can be released."""
        futures = [self._pool.submit(self._write_chunk, *task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)
        return [future.result() for future in futures]

    def _write_chunk(self, part: ShardPart, at: int) -> int:
        """Write the part's `at`-th chunk; return its size on disk."""
        buffers = encode(part.layout, part.chunk(at))
        self.files.write(part.layout.chunk_key(part.first_chunk + at), buffers)
        return sum(buffer.nbytes for buffer in buffers)

    def _size_of(self, layout: ArrayLayout, shard: int) -> int:
        """Size on disk of a chunk of tokens or documents; looked up if it is compressed."""
        if layout.codec == "raw":
            return layout.chunk_bytes + CHECKSUM_BYTES
        return self.files.size(layout.chunk_key(shard))

    def _begin(self, tokens: np.ndarray, documents: np.ndarray) -> None:
        """Write tokens and root, unless a store with the same settings exists."""
        if not self._claims.take(CREATION):
            raise StoreBusy(
                f"another process is creating {self.files.url} right now. Wait for it to finish, then try again"
                f"{self.if_killed}"
            )
        try:
            if has_root(self.files):
                root = read_root(self.files)
                require_same(self.files.url, root.manifest, self.manifest)
                require_writable(self.files.url, root)
            else:
                self._write_beginning(tokens, documents)
        finally:
            self._claims.release(CREATION)

    def _write_beginning(self, tokens: np.ndarray, documents: np.ndarray) -> None:
        """Write everything that comes before the first shard; the root document comes last."""
        for key, data in documents_of(self.manifest).items():
            self.files.replace(key, data)
        for path, values in zip(BEGINNING, (tokens, documents), strict=True):
            part = ShardPart(self.arrays[path], 0, values)
            for first in range(0, part.num_chunks, QUEUED):
                self._write_chunks([(part, at) for at in range(first, min(first + QUEUED, part.num_chunks))])
        self.files.settle(BEGINNING)
        counts = count_all(self.manifest, lambda at: (tokens[at.start : at.stop], documents[at.start : at.stop]))
        write_counts(self.files, counts)
        if not self._claims.keeps(CREATION):
            raise StoreBusy(
                f"another process has started a store at {self.files.url} in the meantime. Run the same command again"
            )
        self.files.replace(ROOT, encode_json(root_document(self.manifest)))

    def close(self) -> None:
        """Bring derived files up to date: the index, and the summary of a finished store."""
        try:
            if self.files.exists(ROOT):
                with self._claims.hold_derived() as holds_claim:
                    is_finished = refresh(self.files, self.manifest, holds_claim)
                if is_finished and not holds_claim:
                    with self._claims.hold_derived(until=lambda: self.files.exists(SUMMARY)) as holds_claim:
                        if holds_claim:
                            refresh(self.files, self.manifest)
        finally:
            self._release()

    def _release(self) -> None:
        self._pool.shutdown()
        self._claims.close()


def compacts_after(shard: int, shards: int) -> bool:
    """Whether the writer that commits this shard brings the index up to date.

    Counting its own shards would not do: none of thousands of writers writes enough. The chosen shards are spread
    evenly, by multiples of the golden ratio, so that writers of every n-th shard get equally many, whatever n is.
    """
    every = max(COMPACT_EVERY, shards // MOST_COMPACTIONS)
    return (shard + 1) * 0x9E3779B1 % 2**32 < 2**32 // every


def refresh(files: Files, manifest: Manifest, holds_claim: bool = True) -> bool:
    """Bring the index up to date and, if the caller `holds_claim`, write missing counts and summary, for which the
    whole store is read. Return whether the store is finished."""
    index = compact(files, manifest, holds_claim)
    is_finished = bool(index.mask(manifest.shards).all())
    if not holds_claim:
        return is_finished
    if not files.exists(COUNTS):
        with Store(files) as store, suppress(ShardCorrupt):  # damaged tokens are counted after their repair
            write_counts(files, count_all(manifest, store.ids))
    if is_finished and read_summary(files, manifest) is None:
        files.replace(SUMMARY, encode_json(to_json(derive_summary(files, manifest, index))))
    return is_finished


def derive_summary(files: Files, manifest: Manifest, index: Index) -> Summary:
    """The summary of a finished store, from the lines of its shards."""
    with Store(files) as store:
        merged = {site: summarise(moments) for site, moments in store.merged_moments(manifest.sites).items()}
    by_hook: dict[str, dict[int, LayerSummary]] = {}
    for site, found in merged.items():
        by_hook.setdefault(site.hook, {})[site.layer] = found
    totals = sorted(index.attention.items())
    return Summary(
        cache_id=manifest.cache_id,
        resid=by_hook.pop(RESID, {}),
        kept_mass={layer: total.kept_mass for layer, total in totals},
        entries_per_row={layer: total.entries / total.rows for layer, total in totals},
        hooks=by_hook,
        format=manifest.format,
    )


def _validate_tokens(manifest: Manifest, tokens: np.ndarray, documents: np.ndarray) -> None:
    expected = (manifest.windows, manifest.context)
    for name, array in (("tokens", tokens), ("documents", documents)):
        found = why_not_uint32(array)
        if found or array.shape != expected:
            raise ShardInvalid(
                f"expected {name} as integers from 0 to 2^32 - 1 of shape {expected}, found {found or array.dtype} "
                f"{array.shape}"
            )
