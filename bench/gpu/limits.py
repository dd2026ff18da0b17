"""The limits of the device: bfloat16 matrix products and copies, repeated until the clocks settle.

The operands are random: copies of ones, and products of few distinct values, draw less power than real data.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from records import record
from stepping import wait_for

TURNS = 5


def measure_rates(
    device: torch.device, seconds: float, units: float, job: Callable[[], object]
) -> tuple[list[float], tuple[float, float]]:
    """Units per second in several turns without a pause in between, and the time span of the measurement."""
    wait_for(device)
    job()
    began, found = time.time(), []
    for _ in range(TURNS):
        wait_for(device)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / TURNS:
            for _ in range(8):  # in flight at once
                job()
            count += 8
            wait_for(device)
        found.append(units * count / (time.perf_counter() - start))
    return found, (began, time.time())


@click.command()
@click.option("--device", default="cuda")
@click.option("--small", is_flag=True)
def main(device: str, small: bool) -> None:
    where = torch.device(device)
    size, floats, seconds = (256, 2**20, 0.2) if small else (8192, 2**29, 2.0)
    left, right = (torch.randn(size, size, device=where).bfloat16() for _ in range(2))
    source = torch.randn(floats, device=where)
    target = torch.empty_like(source)
    limits = {}
    for name, unit, units, job in (
        ("matrix", "FLOP/s", 2 * size**3, lambda: torch.mm(left, right)),
        ("memory", "bytes/s", 2 * source.nbytes, lambda: target.copy_(source)),
    ):
        found, at = measure_rates(where, seconds, units, job)
        limits[name] = sorted(found)[len(found) // 2]
        record(f"{name} rate, sustained for {seconds:g} s", "device", unit, found, at)
    if path := os.environ.get("BENCH_LIMITS"):
        Path(path).write_text(json.dumps(limits))


if __name__ == "__main__":
    main()
