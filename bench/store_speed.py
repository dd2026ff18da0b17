"""The store against plain files, against plain zarr, and against SAELens' cache.

Every ratio is of medians from one run in which the two took turns. The residuals are random: Gaussian in bfloat16, with
a heavy-tailed scale per dimension, as in residual streams. Real ones compress at least as well, because their
dimensions are not independent.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import numpy as np
import zarr
from timing_and_tables import ROUNDS, Row, compare, conclude, gather_facts, speeds_of, take_turns
from worker_pipe import Worker

from saemill.cache_schema import (
    CorpusSpec,
    Manifest,
    ModelSpec,
    Request,
    ShardContent,
    Site,
    Store,
    StoreWriter,
    from_float32,
    shard_memory,
    to_float32,
)
from saemill.cache_schema.commits import Index
from saemill.cache_schema.layout import INDEX, ROOT, encode_json, root_document
from saemill.cache_schema.manifest import seal
from saemill.cache_schema.moments import Moments
from saemill.cache_schema.strict_json import to_json
from saemill.cache_schema.writer import WRITERS

CONTEXT, WIDTH, LAYER, SHARD_WINDOWS = 128, 2304, 19, 256
PLACE = Site("resid", LAYER)
RESID = Request(layers=(LAYER,))
GB = 1e9


@dataclass(frozen=True)
class Bench:
    """Where, how much and how often to measure. W windows of a shard, T context, D width."""

    folder: Path
    shards: int
    rounds: int
    resid: np.ndarray  # [W, T, D] bfloat16 bits: the residuals of every shard

    @property
    def gigabytes(self) -> float:
        return self.shards * self.resid.nbytes / GB


def make_residuals(rng: np.random.Generator) -> np.ndarray:
    scales = rng.lognormal(0, 1, WIDTH).astype(np.float32)
    return rng.standard_normal((SHARD_WINDOWS, CONTEXT, WIDTH), np.float32) * scales


def make_manifest(shards: int, width: int = WIDTH, shard_windows: int = SHARD_WINDOWS, **changes: Any) -> Manifest:
    windows = shards * shard_windows
    manifest = Manifest(
        model=ModelSpec("random", width, dtype=changes.pop("dtype", "bfloat16")),
        corpus=CorpusSpec("random"),
        context=CONTEXT,
        layers=(LAYER,),
        windows=windows,
        splits={"train": (0, windows), "validation": (windows, windows), "test": (windows, windows)},
        shard_windows=shard_windows,
    )
    return replace(manifest, **changes)


def make_content(shard_WTD: np.ndarray, norm: float = 1.0) -> ShardContent:
    """A shard's content. The moments, which a harvest measures, are made up: those of rows of one norm."""
    tokens = np.zeros((SHARD_WINDOWS, CONTEXT), np.uint32)
    moments = Moments(1, np.zeros(WIDTH), norm, norm**2, SHARD_WINDOWS, np.full(CONTEXT, norm))
    return ShardContent(tokens, tokens, {PLACE: shard_WTD}, {PLACE: moments})


def open_writer(folder: Path, manifest: Manifest) -> StoreWriter:
    tokens = np.zeros((manifest.windows, CONTEXT), np.uint32)
    return StoreWriter.create(folder, manifest, tokens, tokens)


def write_store(folder: Path, manifest: Manifest, shard_WTD: np.ndarray, norm: float = 1.0) -> None:
    with open_writer(folder, manifest) as writer:
        for shard in writer.pending():
            with writer.claim(shard):
                writer.write(shard, make_content(shard_WTD, norm))


def chunk_files(folder: Path) -> list[Path]:
    return sorted((folder / f"resid/layer_{LAYER}").glob("c.*"), key=lambda path: int(path.name.split(".")[1]))


def bench_writing(bench: Bench) -> list[Row]:
    """Write a shard of raw chunks with checksums and a commit, against plain files of its bytes with as many fsyncs."""
    folder, content = bench.folder / "write", make_content(bench.resid)
    with open_writer(folder / "store", make_manifest(1)) as writer, ThreadPoolExecutor(WRITERS) as pool:
        fsyncs = count_fsyncs(lambda: writer.write(0, content))
        chunks = np.array_split(bench.resid, len(chunk_files(folder / "store")))
        plain = folder / "plain"
        plain.mkdir()
        jobs = {
            "store": lambda: writer.write(0, content),
            "plain": lambda: write_plain(plain, chunks, fsyncs, pool),
        }
        speeds = speeds_of(bench.resid.nbytes / GB, take_turns(bench.rounds * 3, jobs))
    shutil.rmtree(folder)
    against = f"plain files, {fsyncs} fsyncs"
    return [compare("write raw, checksums and commit", speeds["store"], speeds["plain"], "GB/s", 0.7, against)]


def count_fsyncs(job: Callable[[], object]) -> int:
    """How often a job calls fsync."""
    calls, fsync = [], os.fsync
    os.fsync = lambda fd: (calls.append(fd), fsync(fd))[1]
    try:
        job()
    finally:
        os.fsync = fsync
    return len(calls)


def write_plain(folder: Path, chunks: list[np.ndarray], fsyncs: int, pool: ThreadPoolExecutor) -> None:
    """Write one file per chunk, as many at once as the store does; the remaining fsyncs go to the folder."""

    def write(at: int) -> None:
        with open(folder / f"{at}.bin", "wb", buffering=0) as file:
            file.write(chunks[at].data)
            os.fsync(file.fileno())

    list(pool.map(write, range(len(chunks))))
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(fsyncs - len(chunks)):
        os.fsync(fd)
    os.close(fd)


def bench_codecs(bench: Bench) -> list[Row]:
    """For each codec, a store's size on disk, and how fast it is read, verified, into preallocated memory."""
    folders, rows, raw_bytes = {}, [], bench.shards * bench.resid.nbytes
    for codec in ("raw", "lz4", "zstd"):
        folders[codec] = bench.folder / codec
        start = perf_counter()
        write_store(folders[codec], make_manifest(bench.shards, codec=codec), bench.resid)
        seconds = perf_counter() - start
        size = sum(file.stat().st_size for file in chunk_files(folders[codec]))
        found = f"{size / GB:,.2f} GB, written at {bench.gigabytes / seconds:,.2f} GB/s"
        target = 1.25 if codec == "zstd" else None
        rows.append(Row(f"size of {codec}", found, f"values {raw_bytes / GB:,.2f} GB", raw_bytes / size, target))
    with open_readers(bench, folders) as jobs:
        for job in jobs.values():  # warm
            job()
        speeds = speeds_of(bench.gigabytes, take_turns(bench.rounds, jobs))
    rows.append(compare("read raw, verified", speeds["raw"], speeds["readinto"], "GB/s", 0.5, "readinto, page cache"))
    for name in ("lz4", "zstd", "zarr"):
        title = "read raw by plain zarr" if name == "zarr" else f"read {name}, verified"
        rows.append(compare(title, speeds[name], speeds["readinto"], "GB/s", None, "readinto"))
    for codec in ("lz4", "zstd"):
        shutil.rmtree(folders[codec])
    return rows


@contextmanager
def open_readers(bench: Bench, folders: dict[str, Path]) -> Iterator[dict[str, Callable[[], object]]]:
    """Every way to read all residuals once."""
    stores = {codec: Store.open(folder) for codec, folder in folders.items()}
    memory_of_shard = shard_memory(stores["raw"].manifest, RESID)
    array = zarr.open_array(folders["raw"] / f"resid/layer_{LAYER}", mode="r")
    files = chunk_files(folders["raw"])
    memory = bytearray(files[0].stat().st_size)

    def read(store: Store) -> None:
        for span in store.spans(RESID):
            store.read(RESID, span, memory_of_shard)

    def read_into() -> None:
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                opened.readinto(memory)

    def read_by_zarr() -> None:
        for shard in range(bench.shards):
            array[shard * SHARD_WINDOWS : (shard + 1) * SHARD_WINDOWS]

    jobs: dict[str, Callable[[], object]] = {codec: (lambda s=store: read(s)) for codec, store in stores.items()}
    try:
        yield jobs | {"readinto": read_into, "zarr": read_by_zarr}
    finally:
        for store in stores.values():
            store.close()


def bench_saelens(bench: Bench, environment: Path) -> list[Row]:
    """Read the same float16 residuals and tokens from both, warm; SAELens with the batch size that suits it best.

    Ours starts afresh each turn: a stream that lived through the rounds would read ahead during the peer's turn.
    """
    folder = bench.folder / "peer"
    folder.mkdir()
    shard_WTD = to_float32(bench.resid, "bfloat16").astype(np.float16)
    windows = bench.shards * SHARD_WINDOWS
    np.save(folder / "resid.npy", np.concatenate([shard_WTD] * bench.shards))
    np.save(folder / "tokens.npy", np.zeros((windows, CONTEXT), np.int32))
    write_store(folder / "store", make_manifest(bench.shards, dtype="float16"), shard_WTD)
    script = Path(__file__).parent / "peers/sae_lens_read.py"
    peer, cache = Worker("SAELens", [environment / "bin/python", script]), str(folder / "cache")
    request = Request(layers=(LAYER,), tokens=True)
    try:
        peer.ask(make=cache, resid=str(folder / "resid.npy"), tokens=str(folder / "tokens.npy"))
        (folder / "resid.npy").unlink()
        with Store.open(folder / "store") as store:
            jobs: dict[str, Callable[[], float]] = {"ours": lambda: stream_once(store, request)}
            for batch in (8, 32, 256):
                jobs[f"store batch {batch}"] = lambda batch=batch: seconds_a_token(peer.ask(read=cache, batch=batch))
            jobs["arrow"] = lambda: seconds_a_token(peer.ask(raw=cache, batch=32))
            take_turns(1, jobs)  # warm-up
            speeds = speeds_of(1e-6, take_turns(bench.rounds, jobs))
    finally:
        peer.close()
        shutil.rmtree(folder)
    best = max((name for name in speeds if name.startswith("store ")), key=lambda name: speeds[name].median)
    return [
        compare("stream, verified", speeds["ours"], speeds[best], "M tokens/s", 1.2, f"SAELens {best}"),
        compare("", speeds["ours"], speeds["arrow"], "M tokens/s", None, "its Arrow files as numpy"),
    ]


def stream_once(store: Store, request: Request) -> float:
    """Seconds per token in the second of three epochs: as much is read ahead during it as was read ahead before it."""
    spans = store.spans(request)
    stream = store.stream(request, spans * 3)
    for _ in islice(stream, len(spans)):
        pass
    start = perf_counter()
    tokens = sum(arrays.resid[LAYER].shape[0] * CONTEXT for arrays in islice(stream, len(spans)))
    seconds = perf_counter() - start
    stream.close()
    return seconds / tokens


def seconds_a_token(answer: dict[str, Any]) -> float:
    return answer["seconds"] / answer["tokens"]


def bench_memory(bench: Bench) -> list[Row]:
    """Peak memory growth of a new process that streams the whole store, against the buffers it reports."""
    code = """
import sys
from timing_and_tables import resident
from saemill.cache_schema import Request, Store, shard_memory
request = Request(layers=(19,))
with Store.open(sys.argv[1]) as store:
    before, shard = resident("VmHWM"), shard_memory(store.manifest, request)
    buffers = 2 * sum(array.nbytes for array in shard.values())
    del shard
    for arrays in store.stream(request, in_flight=1):
        pass
    print(resident("VmHWM") - before, buffers)  # not ru_maxrss: a new process inherits that of its parent
"""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths.rstrip(os.pathsep)}
    command = [sys.executable, "-c", code, bench.folder / "raw"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    growth, buffers = map(int, output.stdout.split())
    found = f"{growth / 1e6:,.0f} MB for a store of {bench.gigabytes * 1e3:,.0f} MB"
    return [Row("memory while streaming", found, f"buffers {buffers / 1e6:,.0f} MB", buffers / growth, 0.8)]


def bench_opening(bench: Bench) -> list[Row]:
    """Open a store of 100,000 shards, which needs only its root and its index."""
    folder, shards = bench.folder / "many", 100_000
    (folder / "commits").mkdir(parents=True)
    manifest = seal(make_manifest(shards))
    (folder / ROOT).write_bytes(encode_json(root_document(manifest)))
    rows = []
    for name, ranges in (("finished", ((0, shards),)), ("in the making", ((0, shards // 2),))):
        (folder / INDEX).write_bytes(encode_json(to_json(Index(manifest.cache_id, ranges))))
        opened = speeds_of(1, take_turns(ROUNDS, {"open": lambda: Store.open(folder)}))["open"]
        found = f"{1e3 / opened.median:,.1f} ms"
        rows.append(Row(f"open 100,000 shards, {name}", found, "1 second", opened.median, 1.0))
    return rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--peers", type=click.Path(path_type=Path), help="Environment with SAELens.  [default: no comparison]")
@click.option("--gigabytes", default=1.0, show_default=True, help="Size of the store.")
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to create the temporary folder.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the results here.")
def main(peers: Path | None, gigabytes: float, rounds: int, folder: Path | None, json_file: Path | None) -> None:
    """Measure the store; the exit status is 1 if a target is missed."""
    if peers is not None and not (peers / "bin/python").exists():
        raise click.UsageError(f"no environment at {peers}: create it with `make peers`, or leave out --peers")
    shard_WTD = from_float32(make_residuals(np.random.default_rng(0)), "bfloat16")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        bench = Bench(Path(place), max(2, round(gigabytes * GB / shard_WTD.nbytes)), rounds, shard_WTD)
        rows = [*bench_writing(bench), *bench_codecs(bench), *bench_memory(bench), *bench_opening(bench)]
        if peers is not None:
            shutil.rmtree(bench.folder / "raw")
            rows += bench_saelens(bench, peers)
    title = f"Store of {bench.gigabytes:.2f} GB, width {WIDTH}, context {CONTEXT}, bfloat16, {rounds} rounds in turns"
    sys.exit(conclude(title, rows, json_file, gather_facts(peers and peers / "bin/python")))


if __name__ == "__main__":
    main()
