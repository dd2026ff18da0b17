"""All measurements of an accelerator, within a given time, most important first.

    bash bench/gpu/run.sh --out results            # on a GPU, under ten minutes
    bash bench/gpu/run.sh --small --device cpu     # to try it anywhere, within a few minutes

Each part has its own time limit and stops no other. Numbers are printed and kept as soon as they are measured; the
table comes last, and OUT/<card>.json holds every round, with the card, clocks, versions and commit in each row. The
tree needs no install: wheels that this Python lacks are read from .whl/ and .whl-peers/ (see wheels.sh). This file
imports only the standard library, because nothing else may be installed yet.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BENCH = HERE.parent
SPARE = 8.0  # seconds needed at the end
SHORTEST = 12.0  # seconds; with less left, a part is not worth starting
CLOCKS = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,memory.used,utilization.gpu"
PEERS = ("sae_lens", "dictionary_learning", "sparsify", "SAELens")


@dataclass(frozen=True)
class Part:
    """A command and its limit in seconds."""

    name: str
    limit: float
    command: list[str]

    @property
    def table(self) -> Path | None:
        """The results of a script that uses bench/timing_and_tables.py, whose exit status 1 means a missed target."""
        return Path(self.command[-1]) if "--json" in self.command else None


@dataclass
class Run:
    """The command line's options, and the state of this run."""

    args: argparse.Namespace
    work: Path
    environment: dict[str, str]
    start: float = field(default_factory=time.monotonic)
    status: list[str] = field(default_factory=list)

    @property
    def records(self) -> Path:
        return self.work / "records.jsonl"

    @property
    def log(self) -> Path:
        return self.work / "log.txt"

    @property
    def left(self) -> float:
        return self.args.total - (time.monotonic() - self.start)

    @property
    def peers_python(self) -> Path | None:
        """The peers' Python, if there are peers."""
        if self.args.no_peers:
            return None
        if self.args.peers is not None:
            return (self.args.peers / "bin/python").absolute()
        made = self.work / "peers/python"
        return made if made.exists() else None

    def python(self, *words: object) -> list[str]:
        return [sys.executable, *map(str, words)]


# ---- the machine: wheels, the tree as a package, facts


def prepare(run: Run) -> subprocess.Popen[bytes] | None:
    """Set up the tree as an installed package, and wheels; the peers' are installed while the first parts run."""
    site, package = run.work / "site", run.work / "package"
    package.mkdir()
    (package / "saemill").symlink_to(ROOT)
    write_metadata(package)
    run.environment["PYTHONPATH"] = os.pathsep.join(map(str, (package, BENCH, site)))
    if any((ROOT / ".whl").glob("*.whl")):
        install(run, ROOT / ".whl", site).wait()
    if run.args.no_peers or run.args.peers is not None or not any((ROOT / ".whl-peers").glob("*.whl")):
        return None
    installing = install(run, ROOT / ".whl-peers", run.work / "peers-site")
    write_stub(run.work / "peers-stubs")
    script = run.work / "peers/python"
    script.parent.mkdir()
    paths = os.pathsep.join(str(run.work / name) for name in ("peers-site", "peers-stubs", "site"))
    script.write_text(f'#!/bin/sh\nexport PYTHONPATH={paths}\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return installing


def install(run: Run, wheels: Path, site: Path) -> subprocess.Popen[bytes]:
    words = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target"]
    with open(run.log, "ab") as log:
        return subprocess.Popen(run.python(*words, site, *sorted(wheels.glob("*.whl"))), stdout=log, stderr=log)


def write_metadata(package: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = package / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = {"console_scripts": project.get("scripts", {}), **project.get("entry-points", {})}
    lines = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items())
    (info / "entry_points.txt").write_text("\n".join(lines))


def write_stub(folder: Path) -> None:
    """Write a stub of wandb, 20 MB that SAELens and transformer_lens import and nothing here calls."""
    (folder / "wandb").mkdir(parents=True)
    text = '"""Imported, never called."""\n\n\ndef __getattr__(name):\n    return None\n'
    (folder / "wandb/__init__.py").write_text(text)


def find_facts(run: Run) -> dict[str, Any]:
    """The facts of the machine, which go into every row."""
    words = run.python(HERE / "facts.py", run.peers_python or "")
    done = subprocess.run(words, capture_output=True, text=True, env=run.environment)
    if done.returncode:
        say(run, f"no facts of this machine: {done.stderr[-500:]}")
        return {"card": "unknown"}
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def watched_clocks(run: Run) -> Iterator[None]:
    """Read the clocks once a second, without setting any."""
    if run.args.device == "cpu" or shutil.which("nvidia-smi") is None:
        yield
        return
    words = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader,nounits", "-l", "1"]
    with open(run.work / "clocks.csv", "w") as file, subprocess.Popen(words, stdout=file, stderr=file) as watching:
        try:
            yield
        finally:
            watching.terminate()


# ---- the parts


def parts_of(run: Run) -> list[Part]:
    """The parts, most important first."""
    device, small, rounds = run.args.device, run.args.small, run.args.rounds
    options = ["--device", device, *(["--small"] if small else [])]
    peers = ["--peers-python", run.peers_python] if run.peers_python else []
    compiled = ["--compile"] if run.args.compile else []
    store, tables = run.work / "made_store", {name: run.work / f"{name}.json" for name in ("fleet", "guided")}
    mark = "gpu or either" if device != "cpu" else "not gpu and not slow and not either"
    tests = ["-m", "pytest", "-m", mark, "--timeout", 80, "--maxfail", 20]
    tests += ["-vv", "-p", "no:cacheprovider"]  # undoes the -q of pyproject.toml: a line for each test, as it finishes
    tests += ["-k", run.args.matching] if run.args.matching else []
    tests += ["-p", "no:benchmark"]  # this plugin warns about xdist, and warnings are errors
    if importlib.util.find_spec("xdist"):  # Triton's compiler takes most of the time
        tests += ["-n", min(6, max(1, (os.cpu_count() or 1) // 2))]
    turns = ["--device", device, "--rounds", rounds, "--steps", 2 if small else 24]
    fleet = ["--width", 16384, "--k", 64, "--rows", 4096, "--pool-tokens", 2**16]
    guided = ["--base", "topk", "--width", 16384, "--windows", 32, "--sparsity", 64, "--product", "bfloat16"]
    harvest: list[object] = []
    if small:
        fleet = ["--width", 256, "--k", 8, "--rows", 128, "--pool-tokens", 2**15]
        guided = ["--base", "topk", "--width", 128, "--windows", 4, "--sparsity", 8, "--d-model", 64, "--context", 32]
        harvest = ["--tokens", 1024, "--rounds", 2, "--peer-rounds", 1]
    in_time = ["--limit", max(10, min(180, run.left - 15))]
    jobs_in_time = ["--limit", max(10, min(140, run.left - 18))]  # its jobs are not in the process group that is killed

    def part(name: str, limit: float, script: Path, *words: object) -> Part:
        return Part(name, limit, run.python(script, *words, *(["--json", tables[name]] if name in tables else [])))

    return [
        Part("tests", 90, run.python(*tests, *files_with_gpu_tests())),
        part("small", 150, HERE / "small.py", *options, "--work", run.work / "small", *jobs_in_time),
        part("limits", 25, HERE / "limits.py", *options),
        part("kernels", 70, HERE / "kernels.py", "--variant", "topk", "--variant", "batchtopk", "--profile"),
        part("steps", 200, HERE / "steps.py", *options, *peers, "--rounds", rounds, *in_time, *compiled),
        part("store", 30, HERE / "made_store.py", store, 2 if small else 16),
        part("fleet", 60, BENCH / "fleet.py", store, *turns, *fleet),
        part("guided", 45, BENCH / "guided.py", *turns, *guided),
        part("harvest", 190, HERE / "harvesting.py", *options, *peers, *harvest, *in_time),
        part("reading", 45, HERE / "reading.py", store, "--device", device, "--rounds", rounds),
    ]


def files_with_gpu_tests() -> list[Path]:
    """The files with GPU tests: collecting all of tests/ needs more packages than a bare machine has."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file for file in files if re.search(r"(?<!\")pytest\.mark\.(gpu|either)\b", file.read_text())]


PARTS = ("tests", "small", "limits", "kernels", "steps", "store", "fleet", "guided", "harvest", "reading")
NEEDED = {"fleet": ("store",), "reading": ("store",), "steps": ("limits",), "harvest": ("limits",)}


def chosen(args: argparse.Namespace) -> list[str]:
    """The parts named by --only, and those that they need."""
    wanted = set(args.only.split(",")) if args.only else set(PARTS)
    if unknown := wanted - set(PARTS):
        sys.exit(f"--only: expected some of {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    wanted |= {need for name in wanted for need in NEEDED.get(name, ())}
    if args.device == "cpu":
        wanted.discard("kernels")  # run only on a GPU
    return [name for name in PARTS if name in wanted]


def do_part(run: Run, part: Part, facts: dict[str, Any]) -> None:
    """Run a part. Its output is shown as it comes; its standard error goes to the log, and is shown if it fails."""
    limit = min(part.limit, run.left - SPARE)
    if limit < SHORTEST:
        run.status.append(f"{part.name:<8} no time left")
        return
    say(run, f"== {part.name} (at most {limit:.0f} s; {run.left:.0f} s left in all)")
    start, errors = time.monotonic(), run.work / f"{part.name}.err"
    status, is_late = follow(run, part, limit, errors, facts)
    # Without progress bars, which contain "%|".
    lines = [line.rpartition("\r")[2] for line in errors.read_text(errors="replace").splitlines() if "%|" not in line]
    with open(run.log, "a") as log:
        log.write("".join(f"{line}\n" for line in lines[-60:]))
    if part.table is not None and part.table.exists():
        take_table(run, part.name, part.table)
        status = 0
    verdict = "ok" if status == 0 else "TOO LATE" if is_late else f"exit {status}"
    run.status.append(f"{part.name:<8} {verdict:<9} {time.monotonic() - start:5.0f} s")
    if status:
        print("\n".join(line[:200] for line in lines[-12:]), flush=True)


def follow(run: Run, part: Part, limit: float, errors: Path, facts: dict[str, Any]) -> tuple[int, bool]:
    """Run a part; return its exit status, and whether it was killed for its time. Nothing is left running."""
    how: dict[str, Any] = {"cwd": ROOT, "env": run.environment | {"BENCH_PART": part.name}, "start_new_session": True}
    with (
        open(errors, "w") as error_file,
        open(run.log, "a") as log,
        subprocess.Popen(part.command, stdout=subprocess.PIPE, stderr=error_file, text=True, **how) as process,
    ):
        killer = threading.Timer(limit, lambda: os.killpg(process.pid, signal.SIGKILL))
        killer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip():
                    print(line[:220].rstrip(), flush=True)
                log.write(line)
                log.flush()
                conclude(run, facts)
            status = process.wait()
        finally:
            is_late = not killer.is_alive()
            killer.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # contestants that the part left behind
    return status, is_late


def take_table(run: Run, name: str, path: Path) -> None:
    with open(run.records, "a") as file:
        for row in json.loads(path.read_text())["rows"]:
            kept = {"part": name, "what": f"{name}: {row['name']}", "who": row["found"], **row}
            file.write(json.dumps({key: value for key, value in kept.items() if key not in ("name", "found")}) + "\n")


# ---- the results


def conclude(run: Run, facts: dict[str, Any]) -> None:
    """Write the results so far, so that nothing is lost if this process is stopped."""
    rows = [json.loads(line) for line in run.records.read_text().splitlines()] if run.records.exists() else []
    clocks = read_clocks(run.work / "clocks.csv")
    rows = [row | clocks_of(row, clocks) | facts for row in rows]
    out = run.args.out
    out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", facts["card"].lower()).strip("-")
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    parts = json.dumps(run.status)
    text = f'{{\n "title": {json.dumps("On " + facts["card"])},\n "parts": {parts},\n "rows": [\n{body}\n ]\n}}\n'
    (out / f"{slug}.json").write_text(clean(run, text))
    (out / "table.txt").write_text(clean(run, table_of(rows, run.status)))
    (out / "log.txt").write_text(clean(run, run.log.read_text(errors="replace") if run.log.exists() else ""))
    if (run.work / "clocks.csv").exists():
        shutil.copy(run.work / "clocks.csv", out / "clocks.csv")


def read_clocks(path: Path) -> list[tuple[float, list[float]]]:
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        stamp, *values = line.split(", ")
        with contextlib.suppress(ValueError):
            at = time.mktime(time.strptime(stamp.split(".")[0], "%Y/%m/%d %H:%M:%S"))
            found.append((at, [float(value) for value in values]))
    return found


def clocks_of(row: dict[str, Any], clocks: list[tuple[float, list[float]]]) -> dict[str, Any]:
    """The median clocks during a row's measurement."""
    start, stop = row.get("at") or (math.inf, math.inf)
    seen = [values for at, values in clocks if start - 1 <= at <= stop + 1]
    if not seen:
        return {}
    names = ("sm_mhz", "memory_mhz", "watts", "celsius")
    return {"clocks": {name: statistics.median(values[i] for values in seen) for i, name in enumerate(names)}}


def table_of(rows: list[dict[str, Any]], status: list[str]) -> str:
    """A table of medians and ranges, with each of ours against the best peer."""
    lines = []
    for what in dict.fromkeys(row["what"] for row in rows):
        same = [row for row in rows if row["what"] == what]
        peers = [row["median"] for row in same if "median" in row and row["who"].startswith(PEERS)]
        lines += [line_of(row, max(peers, default=0.0)) for row in same]
    return "\n".join([*lines, "", *status, ""])


def line_of(row: dict[str, Any], best_peer: float) -> str:
    if "failed" in row:
        return f"{row['what']:<36} {row['who']:<38} FAILED {row['failed'].strip().splitlines()[-1][:90]}"
    if "median" not in row:
        ratio = f"  ratio {row['ratio']:.2f}" if row.get("ratio") else ""
        return f"{row['what']:<36} {row['who']} {row.get('against', '')} {row.get('note', '')}".rstrip() + ratio
    text = f"{row['what']:<36} {row['who']:<38} {number(row['median']):>12} {row['unit']:<8}"
    text += f"({number(row['low'])} to {number(row['high'])})"
    text += f"  {row['median'] / best_peer:.2f} of the best peer" if best_peer and row["who"].startswith("ours") else ""
    text += f"  {row['share_of_matrix_rate']:.1%} of the matrix rate" if "share_of_matrix_rate" in row else ""
    text += f"  {row['share_of_bandwidth']:.1%} of the bandwidth" if "share_of_bandwidth" in row else ""
    return text + (f"  {row['peak_gigabytes']:.1f} GB" if "peak_gigabytes" in row else "")


def number(value: float) -> str:
    for size, name in ((1e12, "T"), (1e9, "G")):
        if value >= size:
            return f"{value / size:,.1f} {name}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def clean(run: Run, text: str) -> str:
    """The text without this machine's paths."""
    for path, name in ((run.work, "WORK"), (ROOT, "TREE"), (Path(sys.prefix), "PYTHON"), (Path.home(), "HOME")):
        if str(path) not in ("/", "/usr", "/usr/local"):
            text = text.replace(str(path), name)
    return text


def say(run: Run, text: str) -> None:
    print(text, flush=True)
    with open(run.log, "a") as log:
        log.write(text + "\n")


def make_environment(args: argparse.Namespace, work: Path) -> dict[str, str]:
    """An environment that is offline and writes nothing outside this run's folder."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    made = {"HF_HOME": str(work / "hf"), "TMPDIR": str(work / "tmp"), "TRITON_CACHE_DIR": str(work / "triton")}
    made |= {"BENCH_RECORDS": str(work / "records.jsonl"), "BENCH_LIMITS": str(work / "limits.json")}
    made |= {"PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg", "WANDB_MODE": "disabled", "HF_HUB_DISABLE_TELEMETRY": "1"}
    # Checking for a device must not initialise it, or forks could not use it.
    made |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TOKENIZERS_PARALLELISM": "false"}
    if args.small and args.device == "cpu":
        made["OMP_NUM_THREADS"] = "1"  # tiny tensors do not keep several threads busy
    return os.environ | offline | made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-results/gpu"), help="Folder for the results.")
    parser.add_argument("--only", help=f"Only some of {','.join(PARTS)}; parts that they need are added.")
    parser.add_argument("--matching", help="Run only the tests that match this expression of pytest's -k.")
    parser.add_argument("--total", type=float, default=580, help="Seconds for everything.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="The peers' environment; default: .whl-peers, if it exists.")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--compile", action="store_true", help="Also time SAELens with compile_sae; adds a minute.")
    parser.add_argument("--small", action="store_true", help="Tiny sizes: to try this out, not to measure.")
    args = parser.parse_args()
    args.rounds = 2 if args.small else args.rounds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, which stops all child processes
    wanted = chosen(args)
    with tempfile.TemporaryDirectory(prefix="saemill-bench-", ignore_cleanup_errors=True) as name:
        work = Path(name).resolve()
        (work / "tmp").mkdir()
        run = Run(args, work, make_environment(args, work))
        installing = prepare(run)
        facts = find_facts(run)
        say(run, ", ".join(f"{key} {value}" for key, value in facts.items()))
        with watched_clocks(run):
            for name in wanted:
                if installing is not None and name not in ("tests", "small"):
                    installing.wait()  # nothing is timed while pip runs
                    facts, installing = find_facts(run), None
                part = next(part for part in parts_of(run) if part.name == name)
                do_part(run, part, facts)
                conclude(run, facts)
        print("\n" + (args.out / "table.txt").read_text())


if __name__ == "__main__":
    main()
