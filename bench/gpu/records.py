"""The records of the device benchmark: one line of JSON per number, written as soon as it is measured."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from timing_and_tables import number

FILE = "BENCH_RECORDS"  # the environment variable that names the file; without it, numbers are only printed
START = time.monotonic()


def record(what: str, who: str, unit: str, rounds: Iterable[float], at: tuple[float, float], **more: Any) -> None:
    """Record the values of all rounds, the time span of the measurement, and further facts."""
    values = [float(value) for value in rounds]
    median = statistics.median(values)
    row = {"what": what, "who": who, "unit": unit, "median": median, "low": min(values), "high": max(values)}
    row |= {"rounds": values, "at": list(at), **{name: value for name, value in more.items() if value is not None}}
    keep(row)
    facts = "".join(f", {name} {value:.3g}" for name, value in more.items() if isinstance(value, float))
    tell(f"{what}: {who}: {number(median)} {unit} ({number(min(values))} to {number(max(values))}{facts})")


def record_failure(what: str, who: str, why: str) -> None:
    """Record a contestant that failed: that is a row too."""
    keep({"what": what, "who": who, "failed": why[-600:]})
    tell(f"{what}: {who}: FAILED: {why.strip().splitlines()[-1][:160] if why.strip() else why}")


def keep(row: dict[str, Any]) -> None:
    if path := os.environ.get(FILE):
        with open(path, "a") as file:
            file.write(json.dumps({"part": os.environ.get("BENCH_PART", "")} | row) + "\n")


def tell(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def limits() -> dict[str, float]:
    """The device's limits as measured by limits.py in the same call; empty if it has not run."""
    path = Path(os.environ.get("BENCH_LIMITS", ""))
    return json.loads(path.read_text()) if path.is_file() else {}


def shares(flops: float, bytes_moved: float = 0.0) -> dict[str, float]:
    """Work per second as shares of the device's measured limits."""
    known = limits()
    found = {"share_of_matrix_rate": flops / known["matrix"]} if "matrix" in known and flops else {}
    return found | ({"share_of_bandwidth": bytes_moved / known["memory"]} if "memory" in known and bytes_moved else {})
