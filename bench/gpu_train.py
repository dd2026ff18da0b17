"""Training on an accelerator: top-k steps against the three peers, and the way from disk to device.

Steps at D 2304, batch 4,096, k 64 and two widths; their share of the device's own rate in bfloat16 matrix
products and of its memory bandwidth; and a store read through the loader that training reads it through.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import numpy as np
import torch
from gpu_harvest import MATRIX, best_seconds, matrix_rate, wait_for
from ratios import Row, conclude
from store import WIDTH, make_manifest, make_residuals, write_store

from saemill.cache_schema import Request, Store, from_float32
from saemill.train.data.loader import Loader
from saemill.train.data.plan import Plan
from saemill.train.data.split_sizes import measure_split
from train import PEERS, measure

GB = 1e9
LAYERS = (19,)


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how much of it."""

    widths: tuple[int, ...] = (16384, 65536)
    rows: int = 4096
    k: int = 64
    d_model: int = WIDTH
    shards: int = 32
    matrix: int = MATRIX
    copied: int = 2**30  # floats

    def flops_per_token(self, width: int) -> int:
        """One dense product and five sparse ones: pre-activations, codes, their gradient and two tables'."""
        return 2 * self.d_model * (width + 5 * self.k)

    def bytes_per_step(self, width: int) -> int:
        """What cannot be avoided: Adam's seven passes over two tables, and pre-activations out and in again."""
        return 7 * 2 * 4 * width * self.d_model + 2 * 2 * self.rows * width


SMALL = Sizes((512,), 256, 8, 64, 2, 256, 2**20)


def copy_rate(device: torch.device, floats: int) -> float:
    """Bytes a second that a large copy reads and writes, the best of several."""
    source = torch.ones(floats, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(device, lambda: target.copy_(source))


def bench_steps(sizes: Sizes, device: torch.device, peers: Path | None, rounds: int) -> list[Row]:
    """Steps of everyone at both widths, in turns; bfloat16 products of ours, as they are by default."""
    settings: dict[str, Any] = {"rows": sizes.rows, "d_model": sizes.d_model, "k": sizes.k, "l0": 0.0}
    settings |= {"clock": "wall", "device": str(device), "threads": os.cpu_count() or 1, "rounds": rounds, "steps": 10}
    settings |= {"peers": PEERS if peers else (), "peers_python": str(peers and peers / "bin/python")}
    matrix, memory = matrix_rate(device, sizes.matrix), copy_rate(device, sizes.copied)
    rows = []
    for width in sizes.widths:
        speeds = measure("topk", width, settings)["tokens_per_second"]
        rows += rows_of(sizes, width, speeds, matrix, memory)
    return rows


def rows_of(sizes: Sizes, width: int, speeds: dict[str, float], matrix: float, memory: float) -> list[Row]:
    name, ours = f"topk, {width:,} latents", speeds["ours bfloat16"]
    found = f"{ours:,.0f} tok/s"
    done, moved = ours * sizes.flops_per_token(width), ours / sizes.rows * sizes.bytes_per_step(width)
    rows = [
        Row(f"{name}: {peer}", found, f"{speed:,.0f} tok/s", ours / speed)
        for peer, speed in speeds.items()
        if peer != "ours bfloat16"
    ]
    return [
        *rows,
        Row(f"{name}: of the matrix rate", f"{done / 1e12:,.1f} TFLOP/s", f"{matrix / 1e12:,.1f}", done / matrix),
        Row(f"{name}: of the memory bandwidth", f"{moved / GB:,.0f} GB/s", f"{memory / GB:,.0f}", moved / memory),
    ]


def bench_reading(sizes: Sizes, device: torch.device, folder: Path) -> Row:
    """Disk to device by the loader, against the same files read to the host and nothing else."""
    shard = from_float32(make_residuals(np.random.default_rng(0)), "bfloat16")
    write_store(folder / "store", make_manifest(sizes.shards), shard)
    gigabytes = sizes.shards * shard.nbytes / GB
    files = sorted((folder / f"store/resid/layer_{LAYERS[0]}").glob("c.*"))
    plain, ours = [], []
    for _ in range(3):
        forget(files)
        plain.append(gigabytes / seconds_of(lambda: [file.read_bytes() for file in files]))
        forget(files)
        ours.append(gigabytes / seconds_of(lambda: read_all(folder / "store", device)))
    found, against = f"{max(ours):,.2f} GB/s", f"plain files to the host {max(plain):,.2f} GB/s"
    return Row("disk to device", found, against, max(ours) / max(plain))


def read_all(url: Path, device: torch.device) -> None:
    """Every block of one epoch."""
    with Store.open(url) as store:
        sizes = measure_split(store, "train")
        plan = Plan(sizes, batch_tokens=4096, pool_tokens=2**18, seed=0)
        loader = Loader(store, plan, Request(layers=LAYERS, tokens=True, documents=True, split="train"), device)
        for block in plan.blocks(0):
            loader.block(block)
        loader.close()
    wait_for(device)


def forget(files: list[Path]) -> None:
    """Out of the page cache, so that the disk is read."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(job: Callable[[], object]) -> float:
    start = perf_counter()
    job()
    return perf_counter() - start


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--peers", type=click.Path(path_type=Path), help="The environment that has the peers; none: not compared."
)
@click.option("--rounds", default=5, show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--small", is_flag=True, help="Tiny sizes: to try this script, not to measure.")
@click.option("--folder", type=click.Path(path_type=Path), help="On which disk; a temporary folder by default.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Keep the table here.")
def main(
    peers: Path | None, rounds: int, device: str, small: bool, folder: Path | None, json_file: Path | None
) -> None:
    """Measure training on an accelerator."""
    sizes, where = SMALL if small else Sizes(), torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else device
    rows = bench_steps(sizes, where, peers, rounds)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        rows.append(bench_reading(sizes, where, Path(place)))
    title = f"Training on {name}, D {sizes.d_model}, batch {sizes.rows:,}, k {sizes.k}, {rounds} rounds in turns"
    sys.exit(conclude(f"{title}, torch {torch.__version__}", rows, json_file))


if __name__ == "__main__":
    main()
