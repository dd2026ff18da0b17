"""What a fleet costs: eight top-k SAEs trained from one read of a store, against the same SAEs stepped one by one.

The fleet's steps include the whole stream (shards read and verified, tokens drawn, gathered, scaled); single steps use
a batch in memory. A ratio of 0.95 means that the fleet takes 1.05 times as long.

    python bench/fleet.py STORE [--fleet 8 --width 2048 --k 32]
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

import click
import torch
from stepping import wait_for
from timing_and_tables import ROUNDS, Row, compare, conclude, gather_facts, speeds_of, take_turns

from saemill.cache_schema import Store
from saemill.cache_schema.keep_freed_memory import keep_large_blocks
from saemill.train.data.batch_stream import Feed
from saemill.train.data.scaling import stats_from_moments
from saemill.train.data.shuffle_order import Plan, measure_split
from saemill.train.engine.fleet_of_saes import Fleet
from saemill.train.kit.variant_registry import config_type
from saemill.train.parallel.sums_over_processes import ONE_PROCESS

TOTAL_STEPS = 10_000
ALLOWED = 1.05  # times the single steps' time


class Race:
    """The same SAEs twice: as a fleet on the stream, and one after another on one batch."""

    def __init__(
        self, store: Store, size: int, width: int, k: int, rows: int, pool_tokens: int, device: torch.device
    ) -> None:
        layer = store.manifest.layers[0]
        config = config_type("topk")
        members = {f"seed{n}": config(layer=layer, width=width, k=k, seed=n) for n in range(size)}
        stats = {layer: stats_from_moments(store.moments(layer))}
        plan = Plan(measure_split(store, "train"), batch_tokens=rows, pool_tokens=pool_tokens, seed=0)
        self.fleet = Fleet(members, stats, TOTAL_STEPS, device, ONE_PROCESS)
        self.alone = Fleet(members, stats, TOTAL_STEPS, device, ONE_PROCESS)
        self.feed = Feed(store, plan, self.fleet.needs.values(), stats, device)
        self.device = device
        self._steps = count()
        self._ready = self.feed.draw(next(self._steps)).batch(config(layer=layer).needs())

    def fleet_steps(self, steps: int) -> None:
        for _ in range(steps):
            self.fleet.step(self.feed.draw(next(self._steps)))
        wait_for(self.device)

    def single_steps(self, steps: int) -> None:
        for trainee in self.alone.trainees.values():
            for _ in range(steps):
                trainee.step(self._ready)
        wait_for(self.device)


@click.command()
@click.argument("url", metavar="STORE")
@click.option("--fleet", "size", default=8, show_default=True)
@click.option("--width", default=2048, show_default=True)
@click.option("--k", default=32, show_default=True)
@click.option("--rows", default=2048, show_default=True, help="Tokens per batch.")
@click.option("--steps", default=20, show_default=True, help="Steps per round.")
@click.option("--pool-tokens", type=int, help="Size of the shuffle pool.  [default: 16 batches, so rounds do read]")
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the results here.")
def main(
    url: str,
    size: int,
    width: int,
    k: int,
    rows: int,
    steps: int,
    pool_tokens: int | None,
    rounds: int,
    device: str,
    threads: int,
    json_file: Path | None,
) -> None:
    """Measure a fleet's step against the sum of single steps."""
    torch.set_num_threads(threads)
    keep_large_blocks()
    with Store.open(url) as store:
        race = Race(store, size, width, k, rows, pool_tokens or 16 * rows, torch.device(device))
        race.fleet_steps(6)  # on a GPU the fourth step is recorded
        race.single_steps(6)
        race.feed.loader.waited_seconds = 0.0
        jobs = {"fleet": lambda: race.fleet_steps(steps), "single": lambda: race.single_steps(steps)}
        seconds = take_turns(rounds, jobs)
        waiting = race.feed.loader.waited_seconds / sum(seconds["fleet"])
        race.feed.close()
        shape = f"D {store.manifest.model.d_model}, width {width:,}, k {k}, {rows} tokens"
    speeds = speeds_of(size * steps * rows, seconds)
    speed = compare(f"a fleet of {size}", speeds["fleet"], speeds["single"], "tok/s", 1 / ALLOWED, "single steps")
    rows_of_table = [speed, Row("of it waiting for data", f"{waiting:.1%}")]
    facts = gather_facts(device=device, threads=threads)
    raise SystemExit(conclude(f"one read for a fleet: {shape}, {threads} threads", rows_of_table, json_file, facts))


if __name__ == "__main__":
    main()
