"""Training steps against the peers, in one run, on the same activations.

Every contestant is a process of its own (the peers in their own environment) that takes a few steps on request. Each
round goes through the contestants in a new random order, so that a busy machine slows all of them alike; a ratio is the
median over rounds of (faster peer's seconds / ours). Peers run in float32, their default, and, if the processor has
bfloat16 products, under bfloat16 autocast; with torch's fused Adam, which is faster but not their default.

    python bench/train.py --peers-python PATH --variant topk --width 2304 --width 9216
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from racing import PEERS, TOP_K, VARIANTS, Contest, Entrant, Outcome, make_batches
from rich.console import Console
from rich.table import Table
from timing_and_tables import ROUNDS, Speeds, gather_facts, has_bfloat16, write_rows

PRECISIONS = ("float32", "bfloat16")


def entrants(peers: Iterable[str], precisions: Iterable[str]) -> list[Entrant]:
    ours = [Entrant(f"ours {precision}", "ours", {"precision": precision}) for precision in PRECISIONS]
    theirs = [
        Entrant(f"{peer} {precision}, fused", peer, {"precision": precision, "fused": True})
        for peer in peers
        for precision in precisions
        if (peer, precision) != ("sparsify", "bfloat16")  # which has no such switch on a CPU
    ]
    return [*ours, *theirs]


def rows_of(outcome: Outcome, variant: str, width: int, tokens: int) -> list[dict[str, Any]]:
    """A row per contestant; ours include the ratio to the faster peer of each round."""
    theirs = [seconds for name, seconds in outcome.seconds.items() if not name.startswith("ours")]
    best = [min(turn) for turn in zip(*theirs, strict=True)]
    rows: list[dict[str, Any]] = []
    for name, seconds in outcome.seconds.items():
        row: dict[str, Any] = {"variant": variant, "width": width, "contestant": name}
        row |= {"tokens_per_second": [tokens / value for value in seconds]}
        row |= {"median": tokens / statistics.median(seconds)}
        if best and name.startswith("ours"):
            ratios = [peer / own for peer, own in zip(best, seconds, strict=True)]
            row |= {"ratio_to_faster_peer": statistics.median(ratios), "lowest_ratio": min(ratios)}
        rows.append(row)
    failed = [{"variant": variant, "width": width, "contestant": n, "failed": w} for n, w in outcome.failures.items()]
    return rows + failed


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table("variant", "width", "contestant", "tok/s", "ratio to the faster peer", title=title)
    for row in rows:
        speed = row.get("failed") or str(Speeds(tuple(row["tokens_per_second"])))
        ratio = f"{row['ratio_to_faster_peer']:.2f}" if "ratio_to_faster_peer" in row else ""
        table.add_row(row["variant"], f"{row['width']:,}", row["contestant"], speed[-160:], ratio)
    Console(width=140).print(table)


@click.command()
@click.option("--peers-python", required=True, help="Python with sae-lens and dictionary-learning installed.")
@click.option("--peer", "peers", multiple=True, type=click.Choice(PEERS), default=PEERS[:2], show_default=True)
@click.option("--variant", "variants", multiple=True, type=click.Choice(VARIANTS), default=TOP_K)
@click.option("--width", "widths", multiple=True, type=int, default=(2304, 9216))
@click.option("--d-model", default=2304, show_default=True)
@click.option("--rows", default=2048, show_default=True, help="Tokens per batch.")
@click.option("--k", default=32, show_default=True)
@click.option("--l0", default=0.0, help="Latents that fire at the start (variants without k); 0: as initialised.")
@click.option("--dead", default=0.0, help="Share of latents that never fire, so that auxiliary losses are active.")
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option("--steps", default=2, show_default=True, help="Steps per contestant and round, timed together.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", help="cpu: if the machine is busy.")
@click.option(
    "--peer-precision",
    "precisions",
    multiple=True,
    type=click.Choice(PRECISIONS),
    help="The peers' precision.  [default: float32, and bfloat16 on processors that have it]",
)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the results here.")
def main(
    peers_python: str,
    peers: tuple[str, ...],
    variants: tuple[str, ...],
    widths: tuple[int, ...],
    precisions: tuple[str, ...],
    rounds: int,
    steps: int,
    threads: int,
    d_model: int,
    rows: int,
    out: Path | None,
    **settings: Any,
) -> None:
    """Time training steps of this package and its peers."""
    precisions = precisions or (PRECISIONS if has_bfloat16() else PRECISIONS[:1])
    contest, found = Contest(entrants(peers, precisions), peers_python, threads), []
    with tempfile.TemporaryDirectory() as folder:
        shared = settings | {"batches": make_batches(folder, rows, d_model)}
        for variant in variants:
            for width in widths:
                outcome = contest.race(shared | {"variant": variant, "width": width}, rounds, steps)
                found += rows_of(outcome, variant, width, rows)
    contest.close()
    state = f"L0 {settings['l0']:g}" if settings["l0"] else "as initialised"
    title = f"one step: D {d_model}, batch {rows}, k {settings['k']}, {state}, {threads} threads"
    show(found, title)
    if out is not None:
        facts = gather_facts(peers_python, threads=threads, d_model=d_model, batch=rows, steps=steps, **settings)
        write_rows(out, title, [row | facts for row in found])


if __name__ == "__main__":
    main()
