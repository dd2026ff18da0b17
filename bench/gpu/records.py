"""What the parts of the device benchmark write down: a line of JSON for each number, the moment it is there."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILE = "BENCH_RECORDS"  # the environment variable that names the file; without one numbers are only printed
START = time.monotonic()


def record(what: str, who: str, unit: str, rounds: Iterable[float], at: tuple[float, float], **more: Any) -> None:
    """A number of every round, from when to when they were measured, and what else is told of it."""
    values = [float(value) for value in rounds]
    median = statistics.median(values)
    row = {"what": what, "who": who, "unit": unit, "median": median, "low": min(values), "high": max(values)}
    row |= {"rounds": values, "at": list(at), **{name: value for name, value in more.items() if value is not None}}
    keep(row)
    told = "".join(f", {name} {value:.3g}" for name, value in more.items() if isinstance(value, float))
    tell(f"{what}: {who}: {show(median)} {unit} ({show(min(values))} to {show(max(values))}{told})")


def record_failure(what: str, who: str, why: str) -> None:
    """A contestant that fell out is a row too."""
    keep({"what": what, "who": who, "failed": why[-600:]})
    tell(f"{what}: {who}: FAILED: {why.strip().splitlines()[-1][:160] if why.strip() else why}")


def keep(row: dict[str, Any]) -> None:
    if path := os.environ.get(FILE):
        with open(path, "a") as file:
            file.write(json.dumps({"part": os.environ.get("BENCH_PART", "")} | row) + "\n")


def show(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def tell(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def limits() -> dict[str, float]:
    """What limits.py has measured of the device in the same call; empty where it has not run."""
    path = Path(os.environ.get("BENCH_LIMITS", ""))
    return json.loads(path.read_text()) if path.is_file() else {}


def shares(flops: float, bytes_moved: float = 0.0) -> dict[str, float]:
    """Of the measured rates, for what is done in a second."""
    known = limits()
    found = {"share_of_matrix_rate": flops / known["matrix"]} if "matrix" in known and flops else {}
    return found | ({"share_of_bandwidth": bytes_moved / known["memory"]} if "memory" in known and bytes_moved else {})
