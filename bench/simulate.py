"""Simulate a harvest by thousands of workers on an object store: their requests, the cost and the time.

The claims, the records and the index are the package's own code, on objects in memory: only time and chunks are
simulated. Every request advances a clock; workers die at random, their claims lapse by that clock, and new workers
replace them. To save time and memory, the set of shards with a record and the parsed index are cached, and a record is
emptied once it is in the index, because it is never read again. Requests are counted as s3fs makes them: a test in
tests/cache_schema/test_object_stores.py compares them with a real writer's requests to a real server.
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
from unittest.mock import patch

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
    """The assumptions: how long a request and a shard take, and how often workers die."""

    request_s: float = 0.03
    shard_s: float = 60.0
    chunks: int = 10  # per shard, REMOTE_WRITERS at a time
    chunk_s: float = 0.5
    has_device: bool = True  # a device record next to each record, as in a harvest: one more name in every listing
    deaths_a_day: float = 1.0  # per worker
    return_s: float = 120.0  # until a dead worker is replaced
    seed: int = 0

    @property
    def write_s(self) -> float:
        """Seconds to write a shard."""
        return self.chunk_s * max(1, self.chunks / writer.REMOTE_WRITERS)


class PaperFiles(RemoteFiles):
    """Objects in a dictionary; each request advances a clock."""

    def __init__(self, paper: Paper, shards: int) -> None:
        super().__init__(fsspec.filesystem("memory"), "/paper", "paper")
        self.paper, self.objects, self.committed = paper, {}, np.zeros(shards, bool)
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


AHEAD = 30  # seconds that a worker may run ahead of the others, before their claims would seem lapsed


@dataclass(frozen=True)
class Outcome:
    """The results of a simulated harvest."""

    lost: int
    left: int  # to another run of the same command: claimed by workers that died last, so not lapsed in time
    deaths: int
    hours: float
    requests: Counter[str]
    peak_a_second: float
    index_bytes: int
    compactions: int
    dollars: float


class Harvest:
    """All workers, each an iterator that yields the seconds until its next step."""

    def __init__(self, manifest: Manifest, workers: int, paper: Paper) -> None:
        self.manifest, self.workers, self.paper = seal(manifest), workers, paper
        self.files = PaperFiles(paper, manifest.shards)
        self.draw = random.Random(paper.seed)
        self.deaths = self.compactions = 0
        arrays = arrays_of(self.manifest)
        self.arrays = {path: ArrayRecord("0" * 32, layout.chunk_bytes) for path, layout in arrays.items()}
        self._deriving_until, self._summarised_at = 0.0, math.inf
        self._parsed_index: tuple[bytes, commits.Index] | None = None
        self._by_name = np.array(sorted(range(manifest.shards), key=record_name))
        self._missing: tuple[commits.Index | None, np.ndarray] = None, self._by_name

    def run(self, again: bool = True) -> Outcome:
        """Simulate all workers; `again`: then run the command once more for the shards that dead workers held."""
        turns = [(0.0, number, number, self._life(number)) for number in range(self.workers)]
        end, tie_breaker = 0.0, self.workers
        with self._simulated_clock():
            while turns:
                self.files.now, _, share, life = heapq.heappop(turns)
                wait = next(life, None)
                end = max(end, self.files.now)
                if wait is None:
                    continue
                tie_breaker += 1
                next_turn = self.files.now + wait
                if self.draw.random() < wait * self.paper.deaths_a_day / 86400:
                    self.deaths += 1
                    next_turn, life = next_turn + self.paper.return_s, self._life(share)
                heapq.heappush(turns, (next_turn, tie_breaker, share, life))
            left = int((~self.files.committed).sum())
            self.files.now = end + shard_claims.LEASE_SECONDS
            for _ in self._life(0, alone=True) if again else ():
                pass
        requests, minutes = Counter(self.files.requests), self.files.minutes
        index = commits.read_index(self.files, self.manifest)
        lost = int((~index.mask(self.manifest.shards)).sum())
        return Outcome(
            lost=lost,
            left=left,
            deaths=self.deaths,
            hours=end / 3600,
            requests=requests,
            peak_a_second=max(minutes.values()) / 60,
            index_bytes=len(self.files.objects[INDEX]),
            compactions=self.compactions,
            dollars=sum(DOLLARS[kind] * count for kind, count in requests.items()),
        )

    def _life(self, share: int, alone: bool = False) -> Iterator[float]:
        """A worker's life, as in `sae-harvest --worker`: its share, then what others left and nobody holds."""
        claims, files = LeaseClaims(self.files), self.files
        files.ask("GET")  # the root
        step = 1 if alone else self.workers
        shards = np.flatnonzero(~self._list_records()[share::step]) * step + share
        while len(shards):
            has_written = False
            yield 0.0  # with a million records, listing them takes minutes
            since = files.now
            for shard in shards.tolist():
                if files.now > since + AHEAD:
                    yield 0.0
                    since = files.now
                if claims.take(shard):
                    if read_if_there(files, record_key(shard)) is None:
                        yield self.paper.shard_s * self.draw.uniform(0.9, 1.1)
                        since = files.now
                        assert claims.keeps(shard)  # a lease is longer than a shard's work
                        self._commit(shard)
                        has_written = True
                        if writer.compacts_after(shard, self.manifest.shards):
                            self._derive(claims)
                    claims.release(shard)
            left = np.flatnonzero(~self._list_records()).tolist() if has_written and self.workers > 1 else []
            shards = np.array(claims.worth_trying(left) if left else [], int)
        files.ask("HEAD")  # the root, before anything is derived
        self._derive(claims, is_last=True)

    def _commit(self, shard: int) -> None:
        files = self.files
        files.requests["PUT"] += self.paper.chunks
        files.now += self.paper.write_s
        files.ask("PUT", int(self.paper.has_device))
        record = CommitRecord(self.manifest.cache_id, shard, self.manifest.shard_range(shard), self.arrays)
        commits.write_record(files, record)
        files.committed[shard] = True

    def _read_index(self, files: PaperFiles, manifest: Manifest) -> commits.Index:
        """The index. Every read counts as a request, but the index is parsed only if it has changed."""
        raw = files.objects.get(INDEX)
        if raw is None or self._parsed_index is None or self._parsed_index[0] is not raw:
            index = READ_INDEX(files, manifest)
            self._parsed_index = (raw, index) if raw is not None else None
            return index
        files.ask("GET")
        return self._parsed_index[1]

    def _read_records(self, files: PaperFiles, manifest: Manifest, shards: np.ndarray) -> list[CommitRecord]:
        found = [commits.read_record(files, manifest, shard) for shard in shards.tolist()]
        files.objects.update(dict.fromkeys(map(record_key, shards.tolist()), b""))
        return found

    def _list_records(self, index: commits.Index | None = None) -> np.ndarray:
        """Which shards have a record: the answer is cached, its requests are counted."""
        found = index or commits.read_index(self.files, self.manifest)
        if found.committed != ((0, self.manifest.shards),):
            self.files.ask("LIST", self._pages(found))
        return self.files.committed.copy()

    def _pages(self, index: commits.Index) -> int:
        """The pages of a full listing, or of `S3Files.which_exist`; a shard's device record sorts before its record."""
        has_record, names_each = self.files.committed[self._by_name], 1 + self.paper.has_device
        names_through = np.cumsum(has_record, dtype=np.int64) * names_each  # names up to and including each shard's
        names = int(names_through[-1]) + (INDEX in self.files.objects)
        if self._missing[0] is not index:
            self._missing = index, np.flatnonzero(~index.mask(self.manifest.shards)[self._by_name])
        missing, pages, at = self._missing[1], 0, 0
        if len(missing) > self.files.list_beyond:
            return 1 + names // PAGE
        while at < len(missing):
            pages += 1
            read = names_through[missing[at]] - has_record[missing[at]] + PAGE  # names, including those skipped
            if read >= names:
                break
            last = np.searchsorted(names_through, read)
            at = np.searchsorted(missing, last, "right" if names_through[last] == read else "left")
        return pages

    def _derive(self, claims: LeaseClaims, is_last: bool = False) -> None:
        """Update the index, one worker at a time. Others wait a minute, or for the summary if the harvest is done."""
        is_alone = self._wait_to_derive(shard_claims.DERIVED_SECONDS)
        is_finished = self._refresh(claims, is_alone, is_last)
        if is_last and is_finished and not is_alone and self._wait_to_derive(math.inf):
            self._refresh(claims, True, is_last)

    def _wait_to_derive(self, seconds: float) -> bool:
        """Try for the claim at growing intervals; if `seconds` is infinite, until there is a summary. Return whether
        it was obtained."""
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

    def _refresh(self, claims: LeaseClaims, is_alone: bool, is_last: bool) -> bool:
        """Return whether the harvest is finished."""
        files = self.files
        if is_alone:
            assert claims.take(shard_claims.DERIVED)
        self.compactions += 1
        index = commits.compact(files, self.manifest, is_alone)
        is_finished = index.committed == ((0, self.manifest.shards),)
        if is_last and is_alone:
            files.ask("HEAD")  # the counts
            if is_finished:
                files.ask("GET")  # the summary
                if self._summarised_at > files.now:
                    files.ask("GET", 2)  # a reader opens the store, then reads the lines of moments
                    lines = self.manifest.shards * len(self.manifest.sites)
                    files.ask("GET", lines, at_once=commits.READ_AT_ONCE)
                    files.ask("PUT")
                    self._summarised_at = files.now
        if is_alone:
            self._deriving_until = max(files.now, self._deriving_until)
            claims.release(shard_claims.DERIVED)
        return is_finished

    @contextmanager
    def _simulated_clock(self) -> Iterator[None]:
        """Run claims on the simulated clock. None is renewed, because a shard takes less time than a lease."""
        with (
            patch.object(shard_claims, "time", SimpleNamespace(time=lambda: self.files.now)),
            patch.object(LeaseClaims, "_keep_renewing", lambda _: None),
            patch.object(commits, "find_committed", lambda _, __, index: self._list_records(index)),
            patch.object(commits, "read_index", self._read_index),
            patch.object(commits, "_read_records", self._read_records),
        ):
            yield


def rows_of(harvest: Harvest, outcome: Outcome) -> list[Row]:
    paper, shards, workers = harvest.paper, harvest.manifest.shards, harvest.workers
    ideal = (paper.shard_s + paper.write_s) * -(-shards // workers) / 3600
    per_shard = ", ".join(f"{count / shards:.2f} {kind}" for kind, count in sorted(outcome.requests.items()))
    return [
        Row("shards lost", f"{outcome.lost}", f"{outcome.deaths:,} workers that died", float(not outcome.lost), 1.0),
        Row("shards left to a command more", f"{outcome.left}", f"{shards:,}"),
        Row("hours", f"{outcome.hours:.2f}", f"{ideal:.2f} without requests and deaths", ideal / outcome.hours),
        Row("requests", f"{outcome.requests.total():,}", f"per shard: {per_shard}"),
        Row("requests a second, busiest minute", f"{outcome.peak_a_second:,.0f}", "3,500 PUT, 5,500 GET per prefix"),
        Row("cost of requests", f"${outcome.dollars:,.2f}", "S3's prices"),
        Row("index", f"{outcome.index_bytes:,} bytes", f"written or read {outcome.compactions:,} times"),
    ]


def lay_out_on_paper(name: str, layers: int, hooks: tuple[str, ...], width: int, tokens: float) -> list[Row]:
    """The size of a whole store, computed from the layout that the package would write."""
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
        ("requests to write, to read once", f"{puts + 3 * shards:,}, {objects:,}"),  # two checks, and a release
        (
            "cost of them; of a month on S3",
            f"${puts * DOLLARS['PUT'] + objects * 4e-7:,.0f}; ${size / 1e9 * 0.023:,.0f}",
        ),
        ("metadata", f"records {shards * record / 1e9:,.2f} GB, counts {windows * 5 / 1e6:,.0f} MB"),
        ("names listed where the index lacks all", f"{2 * shards:,}, in {2 * shards // PAGE + 1:,} requests"),
        ("one worker's pass at 1 GB/s", f"{size / 1e9 / 86400:,.0f} days"),
        ("deaths a day of 1,000 workers", "1,000 at one a day each; each costs a shard's work and a ten-minute claim"),
    ]
    return [Row(f"{name}: {what}", found) for what, found in lines]


BATCH, DOCUMENT = 4096, 1000  # tokens; of a document on average
SAMPLED = 3  # blocks of an epoch, and batches of each


def shuffle_on_paper(shards: int) -> list[Row]:
    """How well a trainer's batches mix documents of random lengths, with its own read order and pool."""
    from saemill.train.data.shuffle_order import Plan, SplitSizes, count_pairs, token_order, token_slice
    from saemill.train.run.fill_config_from_store import POOL_BYTES

    manifest = make_manifest(shards)
    layout = arrays_of(manifest)[manifest.sites[0].path]
    per_window, pool = CONTEXT - 1, POOL_BYTES // (2 * manifest.model.d_model)  # trainable tokens
    trainable = np.full(manifest.windows, per_window, np.int64)
    sizes = SplitSizes(0, CONTEXT, manifest.shard_windows, layout.chunks[0], trainable, 0.0, 0.0)
    plan = Plan(sizes, batch_tokens=BATCH, pool_tokens=pool, seed=0)
    blocks, counts = plan.blocks(0), []
    for block in [blocks[at] for at in np.linspace(0, len(blocks) - 1, SAMPLED).astype(int)]:
        documents = np.concatenate([_documents_on_paper(manifest, piece) for piece in block.pieces])
        order = token_order(block, 0)
        for at in np.linspace(0, block.steps - 1, SAMPLED).astype(int):
            drawn = documents[order[token_slice(block, int(at), BATCH)]]
            distinct = [len(np.unique(labels)) for labels in (drawn, drawn >> 20)]
            counts.append((*distinct, *count_pairs(drawn), (drawn[1:] == drawn[:-1]).sum()))
    num_documents, num_shards, same, pairs, adjacent = np.mean(counts, axis=0)
    ideal = f"{2 * DOCUMENT / (manifest.windows * per_window):.1e} in a batch drawn from all tokens"
    return [
        Row("documents in a batch", f"{num_documents:,.0f}", f"{BATCH:,} tokens, {DOCUMENT:,} per document"),
        Row("shards in a batch", f"{num_shards:,.0f}", f"{shards:,}; a pool is {pool:,} tokens"),
        Row("pairs of one document", f"{same / pairs:.1e}", ideal),
        Row("neighbours of one document", f"{adjacent / (BATCH - 1):.1e}", "the same, if their order is random"),
    ]


def _documents_on_paper(manifest: Manifest, piece: Span) -> np.ndarray:
    """The document of each token in some windows: a shard's documents are consecutive, with exponential lengths."""
    first, per_window = manifest.shard_range(piece.shard)[0], CONTEXT - 1
    enough = 4 * manifest.shard_windows * per_window // DOCUMENT
    lengths = np.random.default_rng(piece.shard).exponential(DOCUMENT, enough)
    tokens = np.arange((piece.start - first) * per_window, (piece.stop - first) * per_window)
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
@click.option("--store", is_flag=True, help="Show the sizes of two large stores instead of a harvest.")
@click.option("--shuffle", is_flag=True, help="Show how a trainer's batches mix instead of a harvest.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the results here.")
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
