"""Read everything and compare it with the commit records; undo the commits of damaged shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .commits import AttentionTotals, CommitRecord, derive_index, forget, read_index, read_record
from .disk_and_cloud_files import open_files, read_if_there
from .errors import ManifestInvalid, ShardCorrupt, StoreBusy, StoreError, StoreUnreachable
from .layout import BEGINNING, COUNTS, INDEX, SUMMARY, array_document_key, documents_of, moments_path
from .manifest import Manifest
from .moments import to_line
from .open_and_check_root import read_root, require_writable
from .reader import Store, shard_memory
from .requests_and_spans import Request, ShardArrays, Span
from .shard_claims import open_claims
from .shard_content import digests_by_path, totals_of
from .token_counts_and_summary import count_all, read_counts, read_summary
from .writer import derive_summary, refresh

Memory = dict[Request, dict[str, np.ndarray]]  # reused for shard after shard


@dataclass(frozen=True)
class Damage:
    """One array of one shard that differs from the committed one."""

    shard: int
    array: str
    problem: str

    def __str__(self) -> str:
        return self.problem if f"shard {self.shard}" in self.problem else f"shard {self.shard}: {self.problem}"


@dataclass(frozen=True)
class ShardReport:
    """The findings for one shard."""

    shard: int
    record: CommitRecord | None  # None if it cannot be read, or if the shard is not committed
    damage: tuple[Damage, ...]


def verify_shards(store: Store) -> Iterator[ShardReport]:
    """Read every shard, in order, and report on each; of an uncommitted one, only tokens and documents can be read."""
    memory: Memory = {}
    for shard in range(store.manifest.shards):
        yield _verify_shard(store, shard, memory) if store.committed[shard] else _verify_beginning(store, shard)


def digest(store: Store) -> str:
    """One hash of all committed shards, computed from the bytes on disk, not taken from the records."""
    return store_digest(store.manifest, _verified_records(store))


def _verified_records(store: Store) -> Iterator[CommitRecord]:
    """The record of each committed shard, one at a time: a large store's records fill gigabytes."""
    memory: Memory = {}
    for shard in np.flatnonzero(store.committed).tolist():
        report = _verify_shard(store, shard, memory)
        if report.damage or report.record is None:
            raise ShardCorrupt(str(report.damage[0]))
        yield report.record


def store_digest(manifest: Manifest, records: Iterable[CommitRecord]) -> str:
    """One hash of all content: the cache id and, in shard order, every array's digest.

    It does not depend on codec, shard files, host or path; it does depend on which shards are committed.
    """
    state = hashlib.sha256(manifest.cache_id.encode())
    for record in records:
        lines = sorted((path, entry.digest) for path, entry in record.arrays.items())
        state.update(json.dumps([record.windows, lines]).encode())
    return f"sha256:{state.hexdigest()}"


def find_wrong_derived(store: Store) -> list[str]:
    """Which of index, counts and summary do not match the shards, all of which must have been verified before."""
    files, manifest = store.files, store.manifest
    index = read_index(files, manifest)
    covered = index.mask(manifest.shards)
    derived = derive_index(files, manifest, covered)
    wrong = [] if index == derived else [INDEX]
    if _is_wrong(lambda: read_counts(files, manifest), lambda: count_all(manifest, store.ids)):
        wrong.append(COUNTS)
    if store.committed.all():
        whole = derived if covered.all() else derive_index(files, manifest, store.committed)
        if _is_wrong(lambda: read_summary(files, manifest), lambda: derive_summary(files, manifest, whole)):
            wrong.append(SUMMARY)
    return wrong


def _is_wrong(read: Callable[[], object], derive: Callable[[], object]) -> bool:
    """Whether a file differs from its derivation. A missing file, for which `read` returns None, is not wrong."""
    try:
        found = read()
    except ManifestInvalid:
        return True
    return found is not None and found != derive()


def repair(url: str, damaged: list[int], wrong: Sequence[str] = ()) -> None:
    """Undo the commits of damaged shards, so that a harvest writes them again, and rebuild wrong or missing files."""
    files = open_files(url)
    root = read_root(files)
    manifest = root.manifest
    if damaged:
        require_writable(files.url, root)
    claims = open_claims(files)
    try:
        for shard in damaged:
            if not claims.take(shard):
                raise StoreBusy(
                    f"shard {shard} of {url} is being written right now. Wait for that, then repair{claims.if_killed}"
                )
        with claims.hold_derived(is_required=bool(damaged or wrong)) as holds_claim:
            for key in wrong:
                files.remove(key)
            if damaged:
                forget(files, manifest, damaged)
            refresh(files, manifest, holds_claim)
    finally:
        for shard in damaged:  # or a failed repair would hold them like a dead writer
            claims.release(shard)
        claims.close()


def drop_broken_derived(url: str) -> list[str]:
    """Remove unreadable index, counts and summary, and rewrite wrong array documents; return the repaired keys."""
    files = open_files(url)
    root = read_root(files)
    manifest, repaired = root.manifest, []
    for key, read in ((INDEX, read_index), (SUMMARY, read_summary), (COUNTS, read_counts)):
        try:
            read(files, manifest)
        except ManifestInvalid:
            files.remove(key)
            repaired.append(key)
    kept = {array_document_key(path) for path in root.rechunked}
    for key, data in documents_of(manifest).items():
        if key not in kept and read_if_there(files, key) != data:
            files.replace(key, data)
            repaired.append(key)
    return repaired


def _verify_shard(store: Store, shard: int, memory: Memory) -> ShardReport:
    try:
        record = read_record(store.files, store.manifest, shard)
    except StoreUnreachable:
        raise  # says nothing about the shard
    except StoreError as error:
        return ShardReport(shard, None, (Damage(shard, "commits", str(error)),))
    damage: list[Damage] = []
    found: dict[str, str] = {}
    sums: dict[int, AttentionTotals] = {}
    for name, request in _single_requests(store).items():
        try:
            if request not in memory:
                memory[request] = shard_memory(store.manifest, request)
            arrays = store.read(request, Span(shard, *store.manifest.shard_range(shard)), memory[request])
            found |= _digests(store, shard, request, arrays)
            sums |= {layer: totals_of(csr) for layer, csr in arrays.attention.items()}
        except ShardCorrupt as error:
            damage.append(Damage(shard, name, str(error)))
    for path, value in found.items():
        expected = record.arrays[path].digest if path in record.arrays else "no digest"
        if value != expected:
            damage.append(Damage(shard, path, f"array {path}: expected {expected} as in the record, found {value}"))
    for layer, totals in sums.items():
        if record.attention.get(layer) != totals:  # used by `info` and the summary
            name = f"attention/layer_{layer}"
            problem = f"{name}: expected {record.attention.get(layer)} as in the record, found {totals}"
            damage.append(Damage(shard, name, problem))
    return ShardReport(shard, record, tuple(damage))


def _verify_beginning(store: Store, shard: int) -> ShardReport:
    damage: list[Damage] = []
    for path in BEGINNING:
        try:
            store.read_beginning(path, shard)
        except ShardCorrupt as error:
            damage.append(Damage(shard, path, str(error)))
    return ShardReport(shard, None, tuple(damage))


def _single_requests(store: Store) -> dict[str, Request]:
    """One request for each part that can be damaged independently."""
    manifest = store.manifest
    requests = {"tokens": Request(tokens=True), "documents": Request(documents=True)}
    requests |= {site.path: Request.of([site]) for site in manifest.sites}
    return requests | {
        f"attention/layer_{layer}": Request(attention_layers=(layer,)) for layer in manifest.attention.layers
    }


def _digests(store: Store, shard: int, request: Request, arrays: ShardArrays) -> dict[str, str]:
    """Path -> digest of each array that one request reads."""
    plain = {path: values for path in BEGINNING if (values := getattr(arrays, path)) is not None}
    for hook, layer in request.sites:
        plain[moments_path(layer, hook)] = to_line(store.shard_moments(layer, shard, hook))
    acts = {site: arrays.at(site) for site in request.sites}
    return digests_by_path(plain, acts, arrays.scales, arrays.attention)
