"""Simulate a harvest by thousands of workers on an object store: their requests, the cost and the time.

The claims, the records and the index are the package's own, on objects in memory: only time and chunks are made up.
Every request moves a clock; workers die at random, their claims lapse by that clock, and others replace them. What
would only be recomputed is cached: which shards have a record, and what the index says; a record that is in the index,
which is never read again, is emptied. Requests are counted as s3fs makes them: a test in
tests/cache_schema/test_object_stores.py compares them with those of a real writer to a real server.
"""

from __future__ import annotations

import heapq
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import click
import fsspec
import numpy as np
from store_speed import CONTEXT, make_manifest
from timing_and_tables import Row, conclude, gather_facts

from saemill.cache_schema import commits, shard_claims, writer
from saemill.cache_schema.commits import ArrayRecord, CommitRecord
from saemill.cache_schema.disk_and_cloud_files import PAGE, RemoteFiles, read_if_there
from saemill.cache_schema.layout import BEGINNING, COMMITS, INDEX, arrays_of, encode_json, record_key, record_name
from saemill.cache_schema.manifest import HookSpec, Manifest, seal
from saemill.cache_schema.requests_and_spans import Span
from saemill.cache_schema.shard_claims import LeaseClaims
from saemill.cache_schema.strict_json import to_json

DOLLARS = {"PUT": 5e-6, "LIST": 5e-6, "GET": 4e-7, "HEAD": 4e-7, "DELETE": 0.0}  # S3, us-east-1
READ_INDEX = commits.read_index


@dataclass(frozen=True)
class Paper:
    """What is made up: seconds per request and per shard; how often a worker dies, and what happens then."""

    request_s: float = 0.03
    shard_s: float = 60.0
    chunks: int = 10  # per shard; REMOTE_WRITERS at once, each taking:
    chunk_s: float = 0.5
    has_device: bool = True  # a device record next to each record, as in a harvest: one more name in every listing
    deaths_a_day: float = 1.0  # per worker
    return_s: float = 120.0  # until another one replaces it
    seed: int = 0

    @property
    def write_s(self) -> float:
        """Seconds to write a shard."""
        return self.chunk_s * max(1, self.chunks / writer.REMOTE_WRITERS)


class PaperFiles(RemoteFiles):
    """Objects in a dictionary, requests on a clock."""

    def __init__(self, paper: Paper, shards: int) -> None:
        super().__init__(fsspec.filesystem("memory"), "/paper", "paper")
        self.paper, self.objects, self.committed, self.records = paper, {}, np.zeros(shards, bool), 0
        self.requests: Counter[str] = Counter()
        self.now = 0.0
        self.minutes: Counter[int] = Counter()
        self.claims: set[str] = set()

    def ask(self, kind: str, times: int = 1, at_once: int = 1) -> None:
        self.requests[kind] += times
        self.minutes[int(self.now // 60)] += times
        self.now += self.paper.request_s * times / at_once

    def read(self, key: str) -> bytes:
        self.ask("GET", at_once=commits.READ_AT_ONCE if key.startswith(COMMITS) and key != INDEX else 1)
        return self.objects[key]

    def exists(self, key: str) -> bool:
        self.ask("HEAD")
        if key not in self.objects:
            self.ask("LIST")
        return key in self.objects

    def replace(self, key: str, data: bytes) -> None:
        self.ask("PUT")
        self.objects[key] = data

    def create(self, key: str, data: bytes) -> bool:
        self.ask("PUT")
        self.claims.add(key.removeprefix("claims/"))
        return self.objects.setdefault(key, data) is data

    def remove(self, key: str) -> None:
        self.ask("DELETE")
        self.objects.pop(key, None)
        self.claims.discard(key.removeprefix("claims/"))

    def list(self, folder: str) -> list[str]:
        assert folder == "claims"
        self.ask("LIST", 1 + len(self.claims) // PAGE)
        return list(self.claims)


AHEAD = 30  # seconds that a worker may run ahead of the others: further ahead, their claims would seem lapsed


@dataclass(frozen=True)
class Told:
    """The results."""

    lost: int
    left: int  # to another run of the same command: their writers died last, and their claims had not lapsed
    deaths: int
    hours: float
    requests: Counter[str]
    peak_a_second: float
    index_bytes: int
    compactions: int
    dollars: float


class Harvest:
    """All workers, each an iterator that yields how long it works before its next step."""

    def __init__(self, manifest: Manifest, workers: int, paper: Paper) -> None:
        self.manifest, self.workers, self.paper = seal(manifest), workers, paper
        self.files = PaperFiles(paper, manifest.shards)
        self.draw = random.Random(paper.seed)
        self.deaths = self.compactions = 0
        sizes = {path: ArrayRecord("0" * 32, layout.chunk_bytes) for path, layout in arrays_of(self.manifest).items()}
        self.arrays = sizes
        self._deriving_until, self._summarised_at = 0.0, math.inf
        self._known: tuple[bytes, commits.Index] | None = None
        self._by_name = np.array(sorted(range(manifest.shards), key=record_name))
        self._lacks: tuple[commits.Index | None, np.ndarray] = None, self._by_name

    def run(self, again: bool = True) -> Told:
        turns = [(0.0, number, number, self._life(number)) for number in range(self.workers)]
        ended, born = 0.0, 0
        with self._clock():
            while turns:
                self.files.now, _, share, life = heapq.heappop(turns)
                wait = next(life, None)
                ended = max(ended, self.files.now)
                if wait is None:
                    continue
                born += 1
                back = self.files.now + wait
                if self.draw.random() < wait * self.paper.deaths_a_day / 86400:
                    self.deaths += 1
                    back, life = back + self.paper.return_s, self._life(share)
                heapq.heappush(turns, (back, self.workers + born, share, life))
            left = int((~self.files.committed).sum())
            self.files.now = ended + shard_claims.LEASE_SECONDS
            for _ in self._life(0, alone=True) if again else ():  # what the last to die held
                pass
        requests, minutes = Counter(self.files.requests), self.files.minutes
        index = commits.read_index(self.files, self.manifest)
        lost = int((~index.mask(self.manifest.shards)).sum())
        return Told(
            lost=lost,
            left=left,
            deaths=self.deaths,
            hours=ended / 3600,
            requests=requests,
            peak_a_second=max(minutes.values()) / 60,
            index_bytes=len(self.files.objects[INDEX]),
            compactions=self.compactions,
            dollars=sum(DOLLARS[kind] * count for kind, count in requests.items()),
        )

    def _life(self, share: int, alone: bool = False) -> Iterator[float]:
        """A worker's life, as in `sae-harvest --worker`: its share, then what others have left and nobody holds."""
        held, files = LeaseClaims(self.files), self.files
        files.ask("GET")  # the root
        step = 1 if alone else self.workers
        shards = np.flatnonzero(~self._look()[share::step]) * step + share
        while len(shards):
            wrote = 0
            yield 0.0  # a look takes minutes with a million records
            since = files.now
            for shard in shards.tolist():
                if files.now > since + AHEAD:
                    yield 0.0
                    since = files.now
                if held.take(shard):
                    if read_if_there(files, record_key(shard)) is None:
                        yield self.paper.shard_s * self.draw.uniform(0.9, 1.1)
                        since = files.now
                        assert held.keeps(shard)  # a lease is longer than a shard's work
                        self._commit(shard)
                        wrote += 1
                        if writer.compacts_after(shard, self.manifest.shards):
                            self._derive(held)
                    held.release(shard)
            left = np.flatnonzero(~self._look()).tolist() if wrote and self.workers > 1 else []
            shards = np.array(held.worth_trying(left) if left else [], int)
        files.ask("HEAD")  # the root, before anything is derived
        self._derive(held, ends=True)

    def _commit(self, shard: int) -> None:
        files = self.files
        files.requests["PUT"] += self.paper.chunks
        files.now += self.paper.write_s
        files.ask("PUT", int(self.paper.has_device))
        record = CommitRecord(self.manifest.cache_id, shard, self.manifest.shard_range(shard), self.arrays)
        commits.write_record(files, record)
        files.records += not files.committed[shard]
        files.committed[shard] = True

    def _read_index(self, files: PaperFiles, manifest: Manifest) -> commits.Index:
        """The index: every worker's request counts, but it is parsed only if it has changed."""
        raw = files.objects.get(INDEX)
        if raw is None or self._known is None or self._known[0] is not raw:
            index = READ_INDEX(files, manifest)
            self._known = (raw, index) if raw is not None else None
            return index
        files.ask("GET")
        return self._known[1]

    def _read_records(self, files: PaperFiles, manifest: Manifest, shards: np.ndarray) -> list[CommitRecord]:
        found = [commits.read_record(files, manifest, shard) for shard in shards.tolist()]
        files.objects.update(dict.fromkeys(map(record_key, shards.tolist()), b""))
        return found

    def _look(self, index: commits.Index | None = None) -> np.ndarray:
        """Which shards have a record: the answer is cached, its requests are counted."""
        found = index or commits.read_index(self.files, self.manifest)
        if found.committed != ((0, self.manifest.shards),):
            self.files.ask("LIST", self._pages(found))
        return self.files.committed.copy()

    def _pages(self, index: commits.Index) -> int:
        """The pages of a full listing, or of `S3Files.which_exist`; a shard's device record sorts before its record."""
        has_record, each = self.files.committed[self._by_name], 1 + self.paper.has_device
        ends = np.cumsum(has_record, dtype=np.int64) * each  # names up to and including each shard's
        names = int(ends[-1]) + (INDEX in self.files.objects)
        if self._lacks[0] is not index:
            self._lacks = index, np.flatnonzero(~index.mask(self.manifest.shards)[self._by_name])
        left, pages, at = self._lacks[1], 0, 0
        if len(left) > self.files.list_beyond:
            return 1 + names // PAGE
        while at < len(left):
            pages += 1
            read = ends[left[at]] - has_record[left[at]] + PAGE  # names, including those skipped
            if read >= names:
                break
            last = np.searchsorted(ends, read)
            at = np.searchsorted(left, last, "right" if ends[last] == read else "left")
        return pages

    def _derive(self, held: LeaseClaims, ends: bool = False) -> None:
        """One worker at a time. Others wait for a minute, and for its summary where the harvest is finished."""
        is_alone = self._wait(shard_claims.DERIVED_SECONDS)
        is_finished = self._refresh(held, is_alone, ends)
        if ends and is_finished and not is_alone and self._wait(math.inf):
            self._refresh(held, True, ends)

    def _wait(self, seconds: float) -> bool:
        """Ask for the claim less and less often, without an end until there is a summary; whether it was given."""
        files = self.files
        end, pause = files.now + seconds, 0.05
        slowest = shard_claims.SUMMARY_PAUSE if math.isinf(seconds) else shard_claims.PAUSE
        while self._deriving_until > files.now:
            files.ask("PUT")
            files.ask("GET", 2)
            if math.isinf(seconds):
                files.ask("HEAD")
                if self._summarised_at <= files.now:
                    return False
                files.ask("LIST")
            elif files.now >= end:
                return False
            files.now += pause
            pause = min(2 * pause, slowest)
        return True

    def _refresh(self, held: LeaseClaims, is_alone: bool, ends: bool) -> bool:
        """Return whether the harvest is finished."""
        files = self.files
        if is_alone:
            assert held.take(shard_claims.DERIVED)
        self.compactions += 1
        index = commits.compact(files, self.manifest, is_alone)
        is_finished = index.committed == ((0, self.manifest.shards),)
        if ends and is_alone:
            files.ask("HEAD")  # the counts
            if is_finished:
                files.ask("GET")  # the summary
                if self._summarised_at > files.now:
                    files.ask("GET", 2)  # a reader opens, and reads the lines of moments
                    lines = self.manifest.shards * len(self.manifest.sites)
                    files.ask("GET", lines, at_once=commits.READ_AT_ONCE)
                    files.ask("PUT")
                    self._summarised_at = files.now
        if is_alone:
            self._deriving_until = max(files.now, self._deriving_until)
            held.release(shard_claims.DERIVED)
        return is_finished

    @contextmanager
    def _clock(self) -> Iterator[None]:
        """Make claims live by the simulated clock; none is renewed, as a shard takes less than a lease."""
        kept = shard_claims.time, LeaseClaims._keep_renewing, commits.find_committed
        readers = commits.read_index, commits._read_records
        shard_claims.time = SimpleNamespace(time=lambda: self.files.now)  # type: ignore[assignment]
        LeaseClaims._keep_renewing = lambda _: None  # type: ignore[method-assign]
        commits.find_committed = lambda _, __, index: self._look(index)  # type: ignore[assignment]
        commits.read_index, commits._read_records = self._read_index, self._read_records  # type: ignore[assignment]
        try:
            yield
        finally:
            shard_claims.time, LeaseClaims._keep_renewing, commits.find_committed = kept  # type: ignore[assignment, method-assign]
            commits.read_index, commits._read_records = readers  # type: ignore[assignment]


def rows_of(harvest: Harvest, told: Told) -> list[Row]:
    paper, shards, workers = harvest.paper, harvest.manifest.shards, harvest.workers
    ideal = (paper.shard_s + paper.write_s) * -(-shards // workers) / 3600
    each = ", ".join(f"{count / shards:.2f} {kind}" for kind, count in sorted(told.requests.items()))
    return [
        Row("shards lost", f"{told.lost}", f"{told.deaths:,} workers that died", float(not told.lost), 1.0),
        Row("shards left to a command more", f"{told.left}", f"{shards:,}", None),
        Row("hours", f"{told.hours:.2f}", f"{ideal:.2f} without a request or a death", ideal / told.hours),
        Row("requests", f"{told.requests.total():,}", f"a shard: {each}", None),
        Row("requests a second, busiest minute", f"{told.peak_a_second:,.0f}", "3,500 PUT, 5,500 GET a prefix", None),
        Row("cost of requests", f"${told.dollars:,.2f}", "prices of S3", None),
        Row("index", f"{told.index_bytes:,} bytes", f"written or looked at {told.compactions:,} times", None),
    ]


def lay_out_on_paper(name: str, layers: int, hooks: tuple[str, ...], width: int, tokens: float) -> list[Row]:
    """The size of a whole store, from the layout that the package would write."""
    sites, shard_windows = tuple(range(layers)), 256
    specs = {hook: HookSpec(sites, width) for hook in hooks}
    windows = int(tokens) // CONTEXT // shard_windows * shard_windows
    manifest = seal(replace(make_manifest(windows // shard_windows, width=width), layers=sites, hooks=specs))
    layouts = {path: layout for path, layout in arrays_of(manifest).items() if path not in BEGINNING}
    objects = sum(-(-layout.shape[0] // layout.chunks[0]) for layout in layouts.values())
    size = sum(math.prod(layout.shape) * layout.dtype.itemsize for layout in layouts.values())
    arrays = {path: ArrayRecord("0" * 32, layout.chunk_bytes) for path, layout in layouts.items()}
    record = len(encode_json(to_json(CommitRecord(manifest.cache_id, 0, (0, shard_windows), arrays))))
    shards, puts = manifest.shards, objects + 3 * manifest.shards
    lines = [
        ("bytes", f"{size / 1e12:,.0f} TB in {shards:,} shards of {size / shards / 1e9:,.1f} GB"),
        ("objects", f"{objects + 2 * shards:,}"),
        ("requests to write, to read once", f"{puts + 3 * shards:,}, {objects:,}"),  # two looks, and a release
        (
            "cost of them; of a month on S3",
            f"${puts * DOLLARS['PUT'] + objects * 4e-7:,.0f}; ${size / 1e9 * 0.023:,.0f}",
        ),
        ("metadata", f"records {shards * record / 1e9:,.2f} GB, counts {windows * 5 / 1e6:,.0f} MB"),
        ("names listed where the index lacks all", f"{2 * shards:,}, {2 * shards // PAGE + 1:,} requests"),
        ("one worker's pass at 1 GB/s", f"{size / 1e9 / 86400:,.0f} days"),
        ("deaths a day of 1,000 workers", "1,000 at one a day each; each costs a shard's work and ten minutes' claim"),
    ]
    return [Row(f"{name}: {what}", found) for what, found in lines]


BATCH, DOCUMENT = 4096, 1000  # tokens, of a document in the mean
LOOKED_AT = 3  # blocks of an epoch, and batches of each


def shuffle_on_paper(shards: int) -> list[Row]:
    """How a trainer's batches mix, with its own read order and pool, over documents of random lengths."""
    from saemill.train.data.shuffle_order import Plan, SplitSizes, count_pairs, token_order, token_slice
    from saemill.train.run.fill_config_from_store import POOL_BYTES

    manifest = make_manifest(shards)
    layout = arrays_of(manifest)[manifest.sites[0].path]
    own, pool = CONTEXT - 1, POOL_BYTES // (2 * manifest.model.d_model)  # tokens of a window that train
    trainable = np.full(manifest.windows, own, np.int64)
    sizes = SplitSizes(0, CONTEXT, manifest.shard_windows, layout.chunks[0], trainable, 0.0, 0.0)
    plan = Plan(sizes, batch_tokens=BATCH, pool_tokens=pool, seed=0)
    blocks, counts = plan.blocks(0), []
    for block in [blocks[at] for at in np.linspace(0, len(blocks) - 1, LOOKED_AT).astype(int)]:
        documents = np.concatenate([_documents_on_paper(manifest, piece) for piece in block.pieces])
        order = token_order(block, 0)
        for at in np.linspace(0, block.steps - 1, LOOKED_AT).astype(int):
            drawn = documents[order[token_slice(block, int(at), BATCH)]]
            distinct = [len(np.unique(labels)) for labels in (drawn, drawn >> 20)]
            counts.append((*distinct, *count_pairs(drawn), (drawn[1:] == drawn[:-1]).sum()))
    of_documents, of_shards, same, pairs, beside = np.mean(counts, axis=0)
    ideal = f"{2 * DOCUMENT / (manifest.windows * own):.1e} of a batch drawn from all"
    return [
        Row("documents in a batch", f"{of_documents:,.0f}", f"{BATCH:,} tokens, {DOCUMENT:,} a document", None),
        Row("shards in a batch", f"{of_shards:,.0f}", f"{shards:,}; a pool is {pool:,} tokens", None),
        Row("pairs of one document", f"{same / pairs:.1e}", ideal, None),
        Row("neighbours of one document", f"{beside / (BATCH - 1):.1e}", "as many, where their order is random", None),
    ]


def _documents_on_paper(manifest: Manifest, piece: Span) -> np.ndarray:
    """The documents of the tokens of some windows: a shard's documents are consecutive, with exponential lengths."""
    first, own = manifest.shard_range(piece.shard)[0], CONTEXT - 1
    lengths = np.random.default_rng(piece.shard).exponential(DOCUMENT, 4 * manifest.shard_windows * own // DOCUMENT)
    tokens = np.arange((piece.start - first) * own, (piece.stop - first) * own)
    return (piece.shard << 20) + np.searchsorted(np.cumsum(lengths), tokens, side="right")


PAPERS = (
    ("Gemma-2-2B, 26 layers x 3, 1B tokens", 26, ("mlp_in", "mlp_out"), 2304, 1e9),
    ("110 PB: 62 layers x 4 of width 5376", 62, ("mlp_in", "mlp_out", "attn_out"), 5376, 110e15 / (62 * 4 * 5376 * 2)),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--shards", default=1_000_000, show_default=True)
@click.option("--workers", default=10_000, show_default=True)
@click.option("--deaths", default=1.0, show_default=True, help="Deaths per day and worker.")
@click.option("--shard-seconds", default=60.0, show_default=True, help="Seconds to compute a shard.")
@click.option("--store", is_flag=True, help="Show the stores of two projects instead of a harvest.")
@click.option("--shuffle", is_flag=True, help="Show what a trainer's batches mix instead of a harvest.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Keep the table here.")
def main(
    shards: int,
    workers: int,
    deaths: float,
    shard_seconds: float,
    store: bool,
    shuffle: bool,
    json_file: Path | None,
) -> None:
    """Simulate a harvest; the exit status is 1 if a shard is lost."""
    if shuffle:
        sys.exit(conclude("Batches on paper", shuffle_on_paper(shards), json_file, gather_facts()))
    if store:
        rows = [row for paper in PAPERS for row in lay_out_on_paper(*paper)]
        sys.exit(conclude("Stores on paper", rows, json_file, gather_facts()))
    harvest = Harvest(make_manifest(shards), workers, Paper(deaths_a_day=deaths, shard_s=shard_seconds))
    title = f"On paper: {shards:,} shards, {workers:,} workers that die {deaths:g} times a day each"
    sys.exit(conclude(title, rows_of(harvest, harvest.run()), json_file, gather_facts()))


if __name__ == "__main__":
    main()
