"""Many workers on one S3 server: what they lose, and how close they come to the server's own rate.

The server is moto on loopback, a single Python process: with 64 clients it is the bottleneck. Its own rate is measured
with as many clients that only put, and then get, the same objects. The activations are in a worker's memory before the
clock starts, as are the bytes of a plain client; checksums, digests and uploads are the store's work. Claims, commits
and listings cost a small shard as many requests as a large one: `--megabytes 151` is a shard of Gemma-2-2B.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import subprocess
import sys
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import BrokenBarrierError
from time import perf_counter
from typing import Any

import click
import fsspec
import numpy as np
from store_speed import CONTEXT, LAYER, PLACE, RESID, make_manifest
from timing_and_tables import Row, compare, conclude, gather_facts, speeds_of, take_turns

from saemill.cache_schema import ShardContent, Store, StoreWriter, from_float32
from saemill.cache_schema.layout import record_key
from saemill.cache_schema.manifest import Manifest
from saemill.cache_schema.moments import Moments
from saemill.cache_schema.verify_and_repair import verify_shards
from saemill.cache_schema.writer import REMOTE_WRITERS

SERVER = Path(__file__).parents[1] / "tests/cache_schema/s3_server.py"
FORK = multiprocessing.get_context("fork")  # children share all imports and start at once
WIDTH = 2048

Mark = Callable[[], object]
"""Called by a client when it is ready, and again when its work is done."""


@dataclass(frozen=True)
class Bench:
    """The store to write, and its division among workers. W windows of a shard, T context, D width."""

    workers: int
    manifest: Manifest
    resid: np.ndarray  # [W, T, D] bfloat16 bits

    @property
    def gigabytes(self) -> float:
        return self.manifest.shards * self.resid.nbytes / 1e9

    def share(self, worker: int) -> range:
        return range(worker, self.manifest.shards, self.workers)

    def content(self, shard: int) -> ShardContent:
        """The content of a shard, with its number in the values, so that no shard passes for another."""
        resid = self.resid.copy()
        resid[:, 0, 0] = shard
        windows, context, width = resid.shape
        tokens = np.zeros((windows, context), np.uint32)
        moments = Moments(1, np.zeros(width), 1.0, 1.0, windows, np.ones(context))
        return ShardContent(tokens, tokens, {PLACE: resid}, {PLACE: moments})


@dataclass(frozen=True)
class Spent:
    """Wall-clock seconds, and the server's processor seconds, which tell more on a busy machine."""

    seconds: float
    busy: float


class Server:
    """The server's process, and its parallel clients."""

    def __init__(self, pid: int, clients: int) -> None:
        self._stat = Path(f"/proc/{pid}/stat")
        self.clients = clients

    def side_by_side(self, job: Callable[[int, Mark], object]) -> tuple[Spent, Spent]:
        """The time from when all clients were ready until the last finished its work, and the time spent afterwards."""
        meet, failures = FORK.Barrier(self.clients + 1), FORK.SimpleQueue()

        def work(number: int) -> None:
            try:
                job(number, lambda: meet.wait(3600))
            except BaseException as error:  # noqa: BLE001  # any lost client must be reported
                failures.put(f"client {number}: {type(error).__name__}: {error}")
                meet.abort()

        processes = [FORK.Process(target=work, args=(number,)) for number in range(self.clients)]
        for process in processes:
            process.start()
        marks = []
        with suppress(BrokenBarrierError):
            for _ in range(2):
                meet.wait(3600)
                marks.append(self._now())
        for process in processes:
            process.join()
        if not failures.empty():
            raise click.ClickException(failures.get())
        marks.append(self._now())
        work_s, rest_s = (Spent(b.seconds - a.seconds, b.busy - a.busy) for a, b in pairwise(marks))
        return work_s, rest_s

    def _now(self) -> Spent:
        user, system = self._stat.read_text().rsplit(") ", 1)[1].split()[11:13]
        return Spent(perf_counter(), (int(user) + int(system)) / os.sysconf("SC_CLK_TCK"))


def write_share(bench: Bench, url: str, worker: int, mark: Mark) -> None:
    """A worker's whole life except for the model. The index and the summary come after the second mark."""
    with StoreWriter.open(url) as writer:
        pending, mine, content = writer.pending(), bench.share(worker), bench.content(worker)
        mark()
        for shard in pending:
            if shard in mine:
                with writer.claim(shard) as is_to_do:
                    if is_to_do:
                        content.acts[PLACE][:, 0, 0] = shard
                        writer.write(shard, content)
        mark()


def read_share(bench: Bench, url: str, worker: int, mark: Mark) -> None:
    with Store.open(url) as store:
        spans = [span for span in store.spans(RESID) if span.shard in bench.share(worker)]
        mark()
        for part in store.stream(RESID, spans):
            assert (part.resid[LAYER][:, 0, 0] == part.span.shard).all()
        mark()


def use_each(keys: Sequence[str], use: Callable[[Any, str], object], mark: Mark) -> None:
    """A client that only puts or gets, as many objects at once as the store's writer."""
    s3 = fsspec.filesystem("s3", max_concurrency=1)
    s3.ls("mill")  # connects
    with ThreadPoolExecutor(REMOTE_WRITERS) as pool:
        mark()
        list(pool.map(lambda key: use(s3, key), keys))
        mark()


def keys_of(writer: StoreWriter, shard: int) -> list[str]:
    """The keys of a shard of residuals; the residuals come first."""
    resid, moments = writer.arrays[f"resid/layer_{LAYER}"], writer.arrays[f"stats/layer_{LAYER}"]
    each = writer.manifest.shard_windows // resid.chunks[0]
    chunks = [resid.chunk_key(at) for at in range(shard * each, (shard + 1) * each)]
    return [*chunks, moments.chunk_key(shard), record_key(shard)]


class Jobs:
    """The jobs that take turns. Each write goes to a new place, and the previous one is removed."""

    def __init__(self, bench: Bench, server: Server) -> None:
        self.bench, self.server = bench, server
        self.s3 = fsspec.filesystem("s3", max_concurrency=1)
        self.spent: defaultdict[str, list[tuple[Spent, Spent]]] = defaultdict(list)
        self.places: dict[bool, str] = {}
        self.lost = 0
        with StoreWriter.open(self._create_store()) as writer, writer.claim(0):
            writer.write(0, bench.content(0))
            self.keys = [keys_of(writer, shard) for shard in range(bench.manifest.shards)]
        self.sizes = [self.s3.size(f"{self.places[True]}/{key}") for key in self.keys[0]]
        self.data = os.urandom(max(self.sizes))

    def write(self) -> float:
        url = self._create_store()
        seconds = self._time("write", lambda *client: write_share(self.bench, url, *client))
        with Store.open(url) as store:
            self.lost += int((~store.committed).sum())
        return seconds

    def put(self) -> float:
        url = self._new_place(False)
        sizes = {key: size for keys in self.keys for key, size in zip(keys, self.sizes, strict=True)}

        def work(worker: int, mark: Mark) -> None:
            mine = [key for shard in self.bench.share(worker) for key in self.keys[shard]]
            use_each(mine, lambda s3, key: s3.pipe_file(f"{url}/{key}", self.data[: sizes[key]]), mark)

        return self._time("put", work)

    def read(self) -> float:
        return self._time("read", lambda *client: read_share(self.bench, self.places[True], *client))

    def get(self) -> float:
        def work(worker: int, mark: Mark) -> None:
            mine = [key for shard in self.bench.share(worker) for key in self.keys[shard][:-2]]
            use_each(mine, lambda s3, key: s3.cat_file(f"{self.places[False]}/{key}"), mark)

        return self._time("get", work)

    def check(self) -> None:
        """Check every value of the store written last."""
        with Store.open(self.places[True]) as store:
            self.lost += sum(bool(report.damage) for report in verify_shards(store))
            for part in store.stream(RESID):
                self.lost += bool((part.resid[LAYER] != self.bench.content(part.span.shard).acts[PLACE]).any())

    def median(self, name: str, part: int = 0) -> Spent:
        """The median of a job's work (part 0), or of what followed it (part 1)."""
        found = [spent[part] for spent in self.spent[name]]
        return Spent(statistics.median(s.seconds for s in found), statistics.median(s.busy for s in found))

    def _time(self, name: str, job: Callable[[int, Mark], object]) -> float:
        self.spent[name].append(self.server.side_by_side(job))
        return self.spent[name][-1][0].seconds

    def _new_place(self, is_store: bool) -> str:
        if is_store in self.places:
            self.s3.rm(self.places[is_store], recursive=True)
        self.places[is_store] = f"s3://mill/{uuid.uuid4().hex}"
        return self.places[is_store]

    def _create_store(self) -> str:
        url, tokens = self._new_place(True), np.zeros((self.bench.manifest.windows, CONTEXT), np.uint32)
        StoreWriter.create(url, self.bench.manifest, tokens, tokens).close()
        return url


def measure(bench: Bench, server: Server, rounds: int) -> list[Row]:
    jobs = Jobs(bench, server)
    seconds = take_turns(rounds, {"write": jobs.write, "put": jobs.put})
    seconds |= take_turns(rounds, {"read": jobs.read, "get": jobs.get})
    jobs.check()
    speeds = speeds_of(bench.gigabytes, seconds)
    written = f"{rounds * bench.manifest.shards:,} shards by {bench.workers} workers at a time"
    rows = [Row("shards lost or damaged", f"{jobs.lost}", written, float(not jobs.lost), 1.0)]
    for ours, plain, what in (
        ("write", "put", "write, each shard claimed and committed"),
        ("read", "get", "read, every checksum verified"),
    ):
        rows.append(compare(what, speeds[ours], speeds[plain], "GB/s", 0.9, f"{plain}s"))
        busy, other = jobs.median(ours).busy, jobs.median(plain).busy
        name = f"  the server's processor time to {ours}"
        rows.append(Row(name, f"{busy:.2f} s", f"{plain}s {other:.2f} s", other / busy))
    rest = jobs.median("write", 1)
    rows.append(Row("  all end: index, summary", f"{rest.seconds:.2f} s, {rest.busy:.2f} s of the server"))
    return rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--workers", default=64, show_default=True)
@click.option("--shards", default=2, show_default=True, help="Shards per worker.")
@click.option("--megabytes", default=32, show_default=True, help="Size of a shard.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the results here.")
def main(workers: int, shards: int, megabytes: int, rounds: int, json_file: Path | None) -> None:
    """Measure workers against their server; the exit status is 1 if a shard is lost or a target is missed."""
    windows = max(1, round(megabytes * 1e6 / (CONTEXT * WIDTH * 2)))
    resid = from_float32(np.random.default_rng(0).standard_normal((windows, CONTEXT, WIDTH), np.float32), "bfloat16")
    bench = Bench(workers, make_manifest(workers * shards, width=WIDTH, shard_windows=windows), resid)
    process = subprocess.Popen([sys.executable, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    os.environ |= {"AWS_ACCESS_KEY_ID": "anybody", "AWS_SECRET_ACCESS_KEY": "anything"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": process.stdout.readline().decode().strip()}
    gc.freeze()  # or garbage collection in each child would copy the shared memory
    try:
        subprocess.run([sys.executable, "-c", "import fsspec; fsspec.filesystem('s3').mkdir('mill')"], check=True)
        rows = measure(bench, Server(process.pid, workers), rounds)
    finally:
        process.stdin.close()
        process.wait()
    title = f"{workers} workers, {shards} shards of {megabytes} MB each, one server (moto), {rounds} rounds in turns"
    sys.exit(conclude(title, rows, json_file, gather_facts()))


if __name__ == "__main__":
    main()
