"""What every benchmark shares: jobs timed in turns, so that a ratio is of one run, and a table with verdicts."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

PACKAGES = ("saemill", "numpy", "zarr", "numcodecs", "google-crc32c")


@dataclass(frozen=True)
class Speeds:
    """Units a second of one job, a value a round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        return max(self.rounds)


@dataclass(frozen=True)
class Row:
    """One line of the table. Without a target it is there for the record."""

    name: str
    found: str
    against: str = ""
    ratio: float | None = None
    target: float | None = None

    @property
    def is_met(self) -> bool:
        return self.target is None or (self.ratio is not None and self.ratio >= self.target)


def take_turns(rounds: int, units: float, jobs: Mapping[str, Callable[[], object]]) -> dict[str, Speeds]:
    """Run all jobs once a round, starting with another one each time; return units a second by name."""
    names, seconds = list(jobs), {name: [] for name in jobs}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            jobs[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: Speeds(tuple(units / value for value in values)) for name, values in seconds.items()}


def compare(name: str, ours: Speeds, theirs: Speeds, unit: str, target: float | None = None, against: str = "") -> Row:
    """The ratio of medians of rounds that took turns; the best rounds are told beside them."""
    found = f"{ours.median:,.2f} {unit} (best {ours.best:,.2f})"
    other = f"{against} {theirs.median:,.2f} {unit} (best {theirs.best:,.2f})".strip()
    return Row(name, found, other, ours.median / theirs.median, target)


def render(title: str, rows: list[Row]) -> Table:
    table = Table("what", "found", "against", "ratio", "target", "verdict", title=title, title_justify="left")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        target = "" if row.target is None else f">= {row.target:g}"
        verdict = "" if row.target is None else "[green]met[/green]" if row.is_met else "[red]missed[/red]"
        table.add_row(row.name, row.found, row.against, ratio, target, verdict)
    return table


def conclude(title: str, rows: list[Row], json_file: Path | None) -> int:
    """Print, keep, and return the exit status: 1 where a target is missed."""
    Console(width=160).print(render(title, rows))
    if json_file is not None:
        facts = {
            "title": title,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "versions": {name: version(name) for name in PACKAGES},
            "rows": [asdict(row) | {"is_met": row.is_met} for row in rows],
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(facts, indent=1) + "\n")
    return int(not all(row.is_met for row in rows))
