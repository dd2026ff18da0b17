"""Commit records: a shard exists if and only if its record does.

Records are compacted into one index file. A reader takes the index and looks only for records that are not in
it, so that opening a finished store reads two files and lists no folder. The index is derived: it can be deleted
at any time and is rebuilt from the records.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from .disk_and_cloud_files import Files, read_if_there
from .errors import ManifestInvalid, StoreUnfinished
from .layout import COMMITS, INDEX, SUMMARY, device_name, encode_json, record_key, record_name
from .manifest import Manifest, check_format
from .strict_json import StrictError, from_json, to_json

READ_AT_ONCE = 16  # an object store answers each after some 30 ms
HELD = 256  # answers read ahead: records of 2 kB, or lines of moments of some ten kB
DEVICES_ASKED = 32  # the most shards whose devices are looked up
RECORD_NAME = re.compile(r"[0-9]{5}[.]json|[1-9][0-9]{5,11}[.]json", re.ASCII)
REBUILD_HINT = "It can be deleted: `sae-store repair` rebuilds it"

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class ArrayRecord:
    """One array's share of a shard."""

    digest: str  # of the values, see `shard_content.array_digest`
    bytes: int  # on disk


@dataclass(frozen=True)
class AttentionTotals:
    """Sums over a layer's attention rows, in integers so that the order of addition does not matter."""

    rows: int = 0
    entries: int = 0
    kept_mass_units: int = 0  # sum of kept_mass in units of 2^-24, of which every float16 below 2 is a multiple

    def __add__(self, other: AttentionTotals) -> AttentionTotals:
        return AttentionTotals(
            self.rows + other.rows, self.entries + other.entries, self.kept_mass_units + other.kept_mass_units
        )

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.entries} entries, mass {self.kept_mass_units} * 2^-24"

    @property
    def kept_mass(self) -> float:
        """Mean kept mass of a row."""
        return self.kept_mass_units / 2**24 / max(self.rows, 1)


@dataclass(frozen=True)
class CommitRecord:
    """Everything that was true of a shard when it was committed."""

    cache_id: str
    shard: int
    windows: tuple[int, int]
    arrays: dict[str, ArrayRecord]
    attention: dict[int, AttentionTotals] = field(default_factory=dict)
    format: int = 1


@dataclass(frozen=True)
class DeviceRecord:
    """The device that computed a shard, with everything that affects the last digits of its values.

    It is stored next to the record and is part of no id or digest: only the values count. A shard whose commit is
    undone keeps it, so that a repair can report where the shard came from.
    """

    type: str  # cpu, cuda
    name: str  # of the card, and whether kernels of ours ran; of a processor, its instructions and 16-bit products
    torch: str
    float32_products: str  # ieee, or tf32
    reduced_sums: bool  # whether products in 16 bits may be added up in 16 bits

    def __str__(self) -> str:
        sums = ", sums in 16 bits" if self.reduced_sums else ""
        return f"{self.type} ({self.name}), torch {self.torch}, float32 products {self.float32_products}{sums}"


@dataclass(frozen=True)
class Index:
    """All records in one file: the committed shards, and sums over them."""

    cache_id: str
    committed: tuple[tuple[int, int], ...] = ()  # ranges of shards, first and last plus one
    bytes: dict[str, int] = field(default_factory=dict)
    attention: dict[int, AttentionTotals] = field(default_factory=dict)
    format: int = 1

    def mask(self, shards: int) -> np.ndarray:
        steps = np.zeros(shards + 1, np.int8)  # ranges have gaps between them, so no two edges coincide
        edges = np.array(self.committed, np.int64).reshape(-1, 2)
        steps[edges[:, 0]] = 1
        steps[edges[:, 1]] = -1
        return np.cumsum(steps[:-1], dtype=np.int8).astype(bool)


def read_index(files: Files, manifest: Manifest) -> Index:
    """The index, or an empty one if none was written yet."""
    found = read_checked(Index, files, manifest, INDEX)
    if found is None:
        return Index(manifest.cache_id, format=manifest.format)
    index, where = found
    edges = [edge for span in index.committed for edge in span]
    if edges != sorted(set(edges)) or (edges and not 0 <= edges[0] <= edges[-1] <= manifest.shards):
        raise ManifestInvalid(
            f"{where}: expected rising ranges of the {manifest.shards} shards, found {list(index.committed)}. "
            f"{REBUILD_HINT}"
        )
    return index


def read_record(files: Files, manifest: Manifest, shard: int) -> CommitRecord:
    """The record of a committed shard."""
    remedy = "`sae-store repair` removes the shard"
    found = read_checked(CommitRecord, files, manifest, record_key(shard), remedy)
    if found is None:
        raise StoreUnfinished(
            f"shard {shard} of {files.url} has no commit record: it was never finished. "
            "Run the harvest again: it resumes where it stopped"
        )
    record, where = found
    if record.shard != shard or record.windows != manifest.shard_range(shard):
        raise ManifestInvalid(
            f"{where}: expected shard {shard} with windows {manifest.shard_range(shard)}, "
            f"found shard {record.shard} with windows {record.windows}. {remedy}"
        )
    return record


def _read_records(files: Files, manifest: Manifest, shards: np.ndarray) -> Iterator[CommitRecord]:
    return read_in_order(lambda shard: read_record(files, manifest, shard), shards.tolist())


def read_in_order(read: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Yield `read(item)` for each item in order, `READ_AT_ONCE` at a time and at most `HELD` ahead, to bound memory."""
    running: deque[Future[T]] = deque()
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        try:
            for item in items:
                running.append(pool.submit(read, item))
                if len(running) == HELD:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def write_record(files: Files, record: CommitRecord) -> None:
    files.replace(record_key(record.shard), encode_json(to_json(record)))


def write_device(files: Files, shard: int, device: DeviceRecord) -> None:
    files.replace(f"{COMMITS}/{device_name(shard)}", encode_json(to_json(device)))


def read_devices(files: Files, shards: Sequence[int]) -> dict[int, DeviceRecord]:
    """The devices of a sample of shards, where known: older stores and imports do not record them."""
    found = {}
    for at in np.unique(np.linspace(0, len(shards) - 1, DEVICES_ASKED).round().astype(int)) if shards else ():
        key = f"{COMMITS}/{device_name(shards[at])}"
        with suppress(KeyError, ManifestInvalid, StrictError):  # missing or damaged: it is used for warnings only
            found[shards[at]] = from_json(DeviceRecord, decode_json(files.read(key), key, ""))
    return found


def find_committed(files: Files, manifest: Manifest, index: Index | None = None) -> np.ndarray:
    """bool [S]: the shards that exist."""
    mask = (index or read_index(files, manifest)).mask(manifest.shards)
    missing = np.flatnonzero(~mask).tolist()
    if len(missing) > files.list_beyond:
        found = [int(name[:-5]) for name in files.list(COMMITS) if RECORD_NAME.fullmatch(name)]
        mask[[shard for shard in found if shard < manifest.shards]] = True
        return mask
    shards = {record_name(shard): shard for shard in missing}
    mask[[shards[name] for name in files.which_exist(COMMITS, list(shards))]] = True
    return mask


def compact(files: Files, manifest: Manifest, holds_claim: bool = True) -> Index:
    """Bring the index up to date.

    Writers may compact at the same time, and the last one to write wins; so each checks again after writing, and
    writes again until the index has every record. Without the claim all records are looked for, even those in the
    index: another process may be removing shards, and its index may have been overwritten.
    """
    empty = Index(manifest.cache_id, format=manifest.format)
    while True:
        index = read_index(files, manifest)
        indexed = index.mask(manifest.shards)
        committed = find_committed(files, manifest, index if holds_claim else empty)
        if np.array_equal(committed, indexed):
            return index
        base = empty if (indexed & ~committed).any() else index
        records = _read_records(files, manifest, np.flatnonzero(committed & ~base.mask(manifest.shards)))
        try:
            extended = _extend(base, committed, records)
        except StoreUnfinished:
            if holds_claim:
                raise
            continue  # one was removed after they were listed
        files.replace(INDEX, encode_index(extended))


def forget(files: Files, manifest: Manifest, shards: Iterable[int]) -> None:
    """Undo commits. The index goes first: a kill in between leaves the shards committed, never half removed.

    At the end the index is brought up to date and the summary removed again: a writer that gave up waiting may have
    written either while the records were still there.
    """
    gone = sorted(set(shards))
    files.remove(SUMMARY)  # the summary describes a finished store, and this store is open again
    committed = find_committed(files, manifest)
    committed[gone] = False
    files.replace(INDEX, encode_index(derive_index(files, manifest, committed)))
    for shard in gone:
        files.remove(record_key(shard))
    compact(files, manifest, holds_claim=False)
    files.remove(SUMMARY)


def derive_index(files: Files, manifest: Manifest, committed: np.ndarray) -> Index:
    """The index of these shards, built from their records alone."""
    records = _read_records(files, manifest, np.flatnonzero(committed))
    return _extend(Index(manifest.cache_id, format=manifest.format), committed, records)


def encode_index(index: Index) -> bytes:
    """The same bytes as `encode_json`, nine times as fast: every writer writes it, and it may have 100,000 ranges."""
    rest = encode_json(to_json(replace(index, committed=())))
    spans = ",\n".join(f"  [\n   {start},\n   {stop}\n  ]" for start, stop in index.committed)
    return rest.replace(b'"committed": []', f'"committed": [\n{spans}\n ]'.encode(), 1) if spans else rest


def _extend(index: Index, committed: np.ndarray, records: Iterable[CommitRecord]) -> Index:
    sizes, attention = dict(index.bytes), dict(index.attention)
    for record in records:
        for path, entry in record.arrays.items():
            sizes[path] = sizes.get(path, 0) + entry.bytes
        for layer, totals in record.attention.items():
            attention[layer] = attention.get(layer, AttentionTotals()) + totals
    return replace(index, committed=_ranges(committed), bytes=sizes, attention=attention)


def _ranges(mask: np.ndarray) -> tuple[tuple[int, int], ...]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return tuple((int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True))


def read_checked(
    cls: type[T], files: Files, manifest: Manifest, key: str, remedy: str = REBUILD_HINT
) -> tuple[T, str] | None:
    """A record of this store in a known format, and its location; None if there is none."""
    raw = read_if_there(files, key)
    if raw is None:
        return None
    where = f"{files.url}/{key}"
    value = decode_json(raw, where, remedy)
    check_format(value.get("format"), where)
    if value.get("cache_id") != manifest.cache_id:
        raise ManifestInvalid(
            f"{where}: expected cache id {manifest.cache_id}, found {value.get('cache_id')!r}: "
            f"this file belongs to another store. {remedy}"
        )
    try:
        return from_json(cls, value), where
    except StrictError as error:
        raise ManifestInvalid(f"{where}: {error}. {remedy}") from None


def decode_json(raw: bytes, where: str, remedy: str) -> dict[str, Any]:
    """The JSON object in `raw`, or an error that ends with `remedy`."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(f"{where} is not JSON ({error}). {remedy}") from None
    if not isinstance(value, dict):
        raise ManifestInvalid(f"{where}: expected a JSON object, found {type(value).__name__}. {remedy}")
    return value
