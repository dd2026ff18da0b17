"""Disk to device: a store read by the loader that training uses, against plain files.

Plain files are read by as many threads as the loader has into memory that is already allocated, with and without a copy
from pinned memory to the device. Both are read from the disk, and again from the page cache, as in later epochs.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import torch
from records import record
from stepping import wait_for
from timing_and_tables import take_turns

from saemill.cache_schema import Request, Store
from saemill.train.data.prefetch import PIECES_IN_FLIGHT, Loader
from saemill.train.data.shuffle_order import Plan, measure_split

LAYER = 19


class Plain:
    """Reads the files without any of our code."""

    def __init__(self, files: list[Path], device: torch.device) -> None:
        self.files, self.device = files, device
        largest, pinned = max(file.stat().st_size for file in files), device.type == "cuda"
        self._memory = [torch.empty(largest, dtype=torch.uint8, pin_memory=pinned) for _ in range(PIECES_IN_FLIGHT)]
        self._target = torch.empty(largest, dtype=torch.uint8, device=device)
        self._threads = ThreadPoolExecutor(PIECES_IN_FLIGHT)

    def read(self, copied: bool) -> None:
        list(self._threads.map(lambda thread: self._read_some(thread, copied), range(PIECES_IN_FLIGHT)))
        wait_for(self.device)

    def _read_some(self, thread: int, copied: bool) -> None:
        memory = self._memory[thread]
        view = memoryview(memory.numpy())
        for file in self.files[thread::PIECES_IN_FLIGHT]:
            with open(file, "rb", buffering=0) as opened:
                count = opened.readinto(view)
            if copied:
                self._target[:count].copy_(memory[:count])


def read_all(url: Path, device: torch.device, pool_tokens: int) -> None:
    """Read every block of one epoch."""
    with Store.open(url) as store:
        plan = Plan(measure_split(store, "train"), batch_tokens=4096, pool_tokens=pool_tokens, seed=0)
        request = Request(layers=(LAYER,), tokens=True, documents=True, split="train")
        loader = Loader(store, plan, request, device, steps=None, bounds={})
        for block in plan.blocks(0):
            loader.block(block)
        loader.close()
    wait_for(device)


def forget(files: list[Path]) -> None:
    """Drop files from the page cache, so that the disk is read."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(before: Callable[[], None], job: Callable[[], None]) -> Callable[[], float]:
    def run() -> float:
        before()
        start = time.perf_counter()
        job()
        return time.perf_counter() - start

    return run


@click.command()
@click.argument("url", type=click.Path(path_type=Path))
@click.option("--device", default="cuda")
@click.option("--rounds", default=5, show_default=True)
@click.option("--pool-tokens", default=2**17, show_default=True)
def main(url: Path, device: str, rounds: int, pool_tokens: int) -> None:
    where = torch.device(device)
    files = sorted((url / f"resid/layer_{LAYER}").glob("c.*"))
    random.Random(0).shuffle(files)  # training reads in random order too
    size = sum(file.stat().st_size for file in files)
    plain = Plain(files, where)
    jobs = {
        "ours, every checksum verified": lambda: read_all(url, where, pool_tokens),
        "plain files to the device": lambda: plain.read(True),
        "plain files to the host": lambda: plain.read(False),
    }
    for name, before in (("disk to device", lambda: forget(files)), ("page cache to device", lambda: None)):
        began = time.time()
        turns = {who: timed(before, job) for who, job in jobs.items()}
        take_turns(1, turns)
        seconds = take_turns(rounds, turns)
        for who, values in seconds.items():
            record(name, who, "GB/s", [size / 1e9 / value for value in values], (began, time.time()))


if __name__ == "__main__":
    main()
