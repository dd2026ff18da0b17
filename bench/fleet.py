"""What a fleet costs: eight top-k SAEs trained from one read of a store, against their steps one by one.

The fleet's steps include the whole stream (shards read and verified, tokens drawn, gathered, scaled);
the single steps are of a batch that lies ready. A ratio of 0.95 is a fleet that takes 1.05 times as long.

    python bench/fleet.py STORE [--fleet 8 --width 2048 --k 32]
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

import click
import torch
from ratios import Row, compare, conclude, take_turns

from saemill.cache_schema import Store
from saemill.cache_schema.allocator import keep_large_blocks
from saemill.train.data.feed import Feed
from saemill.train.data.plan import Plan
from saemill.train.data.scaling import stats_from_moments
from saemill.train.data.split_sizes import measure_split
from saemill.train.engine.fleet import Fleet, Member
from saemill.train.kit.registry import config_type
from saemill.train.parallel.ranks import Alone

CPU = torch.device("cpu")
TOTAL_STEPS = 10_000
LONGER = 1.05


class Race:
    """The same SAEs twice: as a fleet on the stream, and one after the other on one batch."""

    def __init__(self, store: Store, size: int, width: int, k: int, rows: int) -> None:
        layer = store.manifest.layers[0]
        config = config_type("topk")
        members = [Member(f"seed{n}", "topk", config(layer=layer, width=width, k=k, seed=n)) for n in range(size)]
        stats = {layer: stats_from_moments(store.moments(layer))}
        plan = Plan(measure_split(store, "train"), batch_tokens=rows, pool_tokens=256 * rows, seed=0)
        self.fleet = Fleet(members, stats, TOTAL_STEPS, CPU, Alone())
        self.alone = Fleet(members, stats, TOTAL_STEPS, CPU, Alone())
        self.feed = Feed(store, plan, self.fleet.needs.values(), stats, CPU)
        self._steps = count()
        self._ready = self.feed.draw(next(self._steps)).batch(config(layer=layer).request())

    def fleet_steps(self, steps: int) -> None:
        for _ in range(steps):
            self.fleet.step(self.feed.draw(next(self._steps)))

    def single_steps(self, steps: int) -> None:
        for trainee in self.alone.trainees.values():
            for _ in range(steps):
                trainee.step(self._ready)


@click.command()
@click.argument("url", metavar="STORE")
@click.option("--fleet", "size", default=8, show_default=True)
@click.option("--width", default=2048, show_default=True)
@click.option("--k", default=32, show_default=True)
@click.option("--rows", default=2048, show_default=True, help="Tokens of a batch.")
@click.option("--steps", default=20, show_default=True, help="In a round.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the results here.")
def main(
    url: str, size: int, width: int, k: int, rows: int, steps: int, rounds: int, threads: int, json_file: Path | None
) -> None:
    """A fleet's step against the sum of single steps."""
    torch.set_num_threads(threads)
    keep_large_blocks()
    with Store.open(url) as store:
        race = Race(store, size, width, k, rows)
        race.fleet_steps(1)
        race.single_steps(1)
        speeds = take_turns(
            rounds,
            size * steps * rows / 1000,
            {"fleet": lambda: race.fleet_steps(steps), "single": lambda: race.single_steps(steps)},
        )
        race.feed.close()
        shape = f"D {store.manifest.model.d_model}, width {width}, k {k}, {rows} tokens"
    table: list[Row] = [
        compare(f"a fleet of {size}", speeds["fleet"], speeds["single"], "ktok/s", 1 / LONGER, "single steps")
    ]
    raise SystemExit(conclude(f"one read for a fleet: {shape}, {threads} threads", table, json_file))


if __name__ == "__main__":
    main()
