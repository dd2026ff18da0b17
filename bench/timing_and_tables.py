"""What all benchmarks share: taking turns, medians and ranges, the facts of a measurement, and the table."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
PACKAGES = ("saemill", "torch", "triton", "transformers", "numpy", "zarr", "numcodecs", "google-crc32c")
PEER_PACKAGES = ("sae-lens", "dictionary-learning", "eai-sparsify", "transformer-lens", "sae-bench", "sae-dashboard")
ROUNDS = 5


@dataclass(frozen=True)
class Speeds:
    """Units per second of one job, one value per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def __str__(self) -> str:
        """The median, and the range over rounds."""
        return f"{number(self.median)} ({number(min(self.rounds))} to {number(max(self.rounds))})"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def mean_and_range(values: Sequence[float], sign: str = "") -> str:
    return f"{statistics.mean(values):{sign}.4f} ({min(values):{sign}.4f} to {max(values):{sign}.4f})"


@dataclass(frozen=True)
class Row:
    """One line of a table. Without a target it only informs."""

    name: str
    found: str
    against: str = ""
    ratio: float | None = None
    target: float | None = None
    rounds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """The values of each round, by contestant."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Facts about this row, in addition to those of the whole run."""

    @property
    def is_met(self) -> bool:
        return self.target is None or (self.ratio is not None and self.ratio >= self.target)

    def document(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "found": self.found, "against": self.against}
        row |= {"ratio": self.ratio, "target": self.target, "is_met": self.is_met}
        return row | {"rounds": {name: list(values) for name, values in self.rounds.items()}, **self.facts, **facts}


def take_turns(rounds: int, jobs: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Run all jobs once per round in a new random order; return seconds by name. A job may return its own seconds."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name in order.sample(list(jobs), len(jobs)):
            start = time.perf_counter()
            result = jobs[name]()
            seconds[name].append(result if isinstance(result, float) else time.perf_counter() - start)
    return seconds


def speeds_of(units: float, seconds: Mapping[str, Iterable[float]]) -> dict[str, Speeds]:
    return {name: Speeds(tuple(units / value for value in values)) for name, values in seconds.items()}


def compare(name: str, ours: Speeds, theirs: Speeds, unit: str, target: float | None = None, against: str = "") -> Row:
    """A row with the ratio of the medians."""
    found, other = f"{ours} {unit}", f"{against} {theirs} {unit}".strip()
    rounds = {"ours": ours.rounds, against or "theirs": theirs.rounds}
    return Row(name, found, other, ours.median / theirs.median, target, rounds)


def gather_facts(peers_python: str | os.PathLike[str] | None = None, **more: Any) -> dict[str, Any]:
    """The facts of a measurement: versions, processor, commit, allocator settings."""
    facts: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "processor": processor()}
    facts |= {"cores": os.cpu_count(), "python": platform.python_version()}
    facts |= {name: found for name in PACKAGES if (found := _version(name))}
    facts["allocator"] = "ours: keep_large_blocks (large freed blocks stay with the process); peers: as it is"
    return facts | peer_versions(peers_python) | more


def commit() -> str:
    """The checked-out commit, with a plus if tracked files have changes; in a copy without git, read from a file."""
    if found := _output_of("git", "-C", HERE, "rev-parse", "--short=9", "HEAD"):
        return found + "+" * bool(_output_of("git", "-C", HERE, "status", "--porcelain", "-uno"))
    copied = HERE.parent / ".whl/COMMIT"
    return os.environ.get("COMMIT") or (copied.read_text().strip() if copied.exists() else "unknown")


def revision_of(checkout: str | os.PathLike[str] | None) -> dict[str, str]:
    """The commit of CLT-Forge, which is not installed as a package."""
    if checkout is None:
        return {}
    is_root = _output_of("git", "-C", checkout, "rev-parse", "--show-toplevel") == str(Path(checkout).resolve())
    return {"CLT-Forge": _output_of("git", "-C", checkout, "rev-parse", "--short=9", "HEAD") if is_root else "unknown"}


def _cpuinfo() -> str:
    """The kernel's description of the processor; empty if there is none."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def processor() -> str:
    names = [line.partition(":")[2].strip() for line in _cpuinfo().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def has_bfloat16() -> bool:
    """Whether this processor has bfloat16 products; on others, autocast only slows a peer down."""
    return any(word in _cpuinfo() for word in ("avx512_bf16", "amx_bf16", " bf16"))


def peer_versions(python: str | os.PathLike[str] | None) -> dict[str, str]:
    """The versions of the peers and of the packages they run on, in their own environment."""
    if python is None:
        return {}
    names = (*PEER_PACKAGES, "torch", "transformers")
    code = "import sys, json, importlib.metadata as m\nfound = {}\nfor n in sys.argv[1:]:\n"
    code += "    try: found[n] = m.version(n)\n    except m.PackageNotFoundError: pass\nprint(json.dumps(found))"
    found = json.loads(_output_of(python, "-c", code, *names) or "{}")
    return {name if name in PEER_PACKAGES else f"peers' {name}": value for name, value in found.items()}


def _version(name: str) -> str | None:
    """The version of a package; None if it is missing or the tree runs without an install."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _output_of(*command: object) -> str:
    """The standard output of a command; empty if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def render(title: str, rows: list[Row]) -> Table:
    table = Table("what", "found", "against", "ratio", "target", "verdict", title=title, title_justify="left")
    for row in rows:
        ratio = "" if row.ratio is None or math.isnan(row.ratio) else f"{row.ratio:.2f}"
        target = "" if row.target is None else f">= {row.target:.3g}"
        verdict = "" if row.target is None else "[green]met[/green]" if row.is_met else "[red]missed[/red]"
        table.add_row(row.name, row.found, row.against, ratio, target, verdict)
    return table


def write_rows(path: Path, title: str, rows: Iterable[Mapping[str, Any]], **more: Any) -> None:
    """Write one row per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in {"title": title, **more}.items())
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.write_text(f'{{\n{head} "rows": [\n{lines}\n ]\n}}\n')


def conclude(title: str, rows: list[Row], json_file: Path | None, facts: Mapping[str, Any]) -> int:
    """Print and write the rows, and return the exit status: 1 if a target is missed. A file's earlier rows stay if they
    belong to other parts of the benchmark, or are about another store or model."""
    Console(width=160).print(render(title, rows))
    new = [row.document(facts) for row in rows]
    duplicates = [identity for identity, count in Counter(map(_identity, new)).items() if count > 1]
    if duplicates:
        raise ValueError(f"expected a different name for each row, found {duplicates} twice")
    if json_file is not None:
        kept = json.loads(json_file.read_text())["rows"] if json_file.exists() else []
        now_about = {row["name"] for row in new if "about" in row}
        kept = [row for row in kept if "about" in row or row["name"] not in now_about]  # older rows did not record it
        write_rows(json_file, title, {_identity(row): row for row in [*kept, *new]}.values())
    return int(not all(row.is_met for row in rows))


def _identity(row: Mapping[str, Any]) -> tuple[str, str | None]:
    """A row's name, and the store or model that it is about if it records one."""
    return row["name"], row.get("about")


def resident(field_name: str = "VmRSS") -> int:
    """Bytes of this process's memory, as counted by the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field_name)) * 1024


def peak_growth(job: Callable[[], object]) -> int:
    """How far the memory of this process rises above its current size while the job runs."""
    Path("/proc/self/clear_refs").write_text("5")
    start = resident()
    job()
    return resident("VmHWM") - start
