"""Training steps against the peers, in one run, on the same activations.

Every contestant is a process of its own (the peers in their own environment) that makes a few steps
when told to. Rounds go through the contestants in turn, so that a machine with other work slows all
of them alike; a ratio is the median over rounds of (peer's seconds / ours).

    python bench/train.py --peers-python PATH --variant topk --width 2304 --width 9216
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
PEERS = ("sae_lens", "dictionary_learning", "sparsify")
VARIANTS = ("topk", "batchtopk", "matryoshka", "standard", "jumprelu", "gated", "p_anneal")
TOP_K = ("topk", "batchtopk", "matryoshka")
ABSENT = {("sae_lens", "p_anneal"), *(("sparsify", variant) for variant in VARIANTS if variant != "topk")}


@dataclass
class Contestant:
    """A process that makes steps."""

    name: str
    process: subprocess.Popen[str]

    def steps(self, count: int) -> list[float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(("[", '"ready"')):
                return json.loads(line)
        raise click.ClickException(f"{self.name} ended without an answer; run its command by hand to see why")

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


def start(name: str, python: str, arguments: list[str], threads: int) -> Contestant:
    script = "ours" if name.startswith("ours") else name
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [python, "-W", "ignore", str(HERE / "peers" / f"{script}_step.py"), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    contestant = Contestant(name, process)
    contestant.answer()
    return contestant


def make_batches(folder: str, rows: int, d_model: int, count: int = 3) -> None:
    """Gaussian rows of mean norm sqrt(D): what a step costs does not depend on more."""
    generator = np.random.default_rng(0)
    for index in range(count):
        np.save(Path(folder) / f"batch_{index}.npy", generator.standard_normal((rows, d_model), dtype=np.float32))


def race(contestants: list[Contestant], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of every contestant and round, after ten steps: until then the allocator still grows."""
    for contestant in contestants:
        contestant.steps(10)
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in contestants:
            seconds[contestant.name].append(min(contestant.steps(steps)))
    return seconds


def measure(variant: str, width: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        make_batches(folder, settings["rows"], settings["d_model"])
        shared = [folder, variant, str(width), str(settings["k"]), str(settings["l0"])]
        shared += [settings["clock"], settings["device"]]
        products = ("float32", "bfloat16") if variant in TOP_K else ("float32",)
        contestants = [
            start(f"ours {product}", sys.executable, [*shared, product], settings["threads"]) for product in products
        ]
        contestants += [
            start(peer, settings["peers_python"], shared, settings["threads"])
            for peer in settings["peers"]
            if (peer, variant) not in ABSENT
        ]
        try:
            seconds = race(contestants, settings["rounds"], settings["steps"])
        finally:
            for contestant in contestants:
                contestant.end()
    return {"variant": variant, "width": width, **summary(seconds, settings["rows"])}


def summary(seconds: dict[str, list[float]], rows: int) -> dict[str, Any]:
    """Tokens per second of all, and the ratio of each of our forms to the faster peer."""
    speed = {name: rows / statistics.median(times) for name, times in seconds.items()}
    peers = [name for name in seconds if not name.startswith("ours")]
    best = [min(times) for times in zip(*(seconds[peer] for peer in peers), strict=True)]
    ratios = {
        name: statistics.median(peer / own for peer, own in zip(best, times, strict=True))
        for name, times in seconds.items()
        if peers and name.startswith("ours")
    }
    return {"tokens_per_second": speed, "ratio_to_faster_peer": ratios}


def show(results: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    names = [
        name
        for name in ("ours float32", "ours bfloat16", *PEERS)
        if any(name in r["tokens_per_second"] for r in results)
    ]
    for heading in ("variant", "width", *(f"{name}\ntok/s" for name in names), "ratio\nfloat32", "ratio\nbfloat16"):
        table.add_column(heading, justify="right")
    for result in results:
        speed, ratio = result["tokens_per_second"], result["ratio_to_faster_peer"]
        cells = [f"{speed[name]:,.0f}" if name in speed else "" for name in names]
        cells += [f"{ratio[name]:.2f}" if name in ratio else "" for name in ("ours float32", "ours bfloat16")]
        table.add_row(result["variant"], str(result["width"]), *cells)
    Console(width=140).print(table)


@click.command()
@click.option("--peers-python", required=True, help="Python with sae-lens and dictionary-learning installed.")
@click.option("--peer", "peers", multiple=True, type=click.Choice(PEERS), default=PEERS[:2], show_default=True)
@click.option("--variant", "variants", multiple=True, type=click.Choice(VARIANTS), default=TOP_K)
@click.option("--width", "widths", multiple=True, type=int, default=(2304, 9216))
@click.option("--d-model", default=2304, show_default=True)
@click.option("--rows", default=2048, show_default=True, help="Tokens of a batch.")
@click.option("--k", default=32, show_default=True)
@click.option("--l0", default=0.0, help="Start where this many latents fire (variants without k); 0: as initialised.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", default=2, show_default=True, help="Steps of each contestant and round; the fastest counts.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", help="cpu: for a machine with other work.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the results as JSON.")
def main(variants: tuple[str, ...], widths: tuple[int, ...], out: Path | None, **settings: Any) -> None:
    """Training steps of this package and its peers."""
    results = [measure(variant, width, settings) for variant in variants for width in widths]
    state = f"L0 {settings['l0']:g}" if settings["l0"] else "as initialised"
    title = f"one step: D {settings['d_model']}, batch {settings['rows']}, k {settings['k']}, {state}"
    show(results, f"{title}, {settings['threads']} threads, {settings['clock']} clock")
    if out is not None:
        del settings["peers_python"]  # a place on this machine
        out.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
