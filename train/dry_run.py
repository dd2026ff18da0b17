"""Dry runs: what a run would train, on how much text, and how long that would take here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from ..cache_schema import Store
from ..cache_schema.numbers_in_words import counted, say_busy, say_size, say_time
from .data.batch_stream import Feed
from .data.shuffle_order import Plan
from .disk.write_and_load_checkpoints import KEPT
from .errors import ConfigInvalid
from .run.fill_config_from_store import Settled, settle
from .run.fits_in_memory import COPIES, build_shapes, weight_bytes
from .run.process import Process
from .run.run_folder import RunFolder
from .run.start_or_resume import apply_init, make_fleet, report_out_of_memory
from .train_runs import requests_of, require_cache, settings_of

WARM_UP_STEPS, MOST_STEPS, MOST_SECONDS = 2, 30, 3.0
POOL_BATCHES = 16  # a small pool: filling a whole one would take longer than the timed steps


@dataclass(frozen=True)
class Estimate:
    """The result of a dry run."""

    settled: Settled
    described: Mapping[str, Any]
    """What its config.json would contain."""
    weight_bytes: int
    """Size of the weights of all SAEs."""
    rates: Mapping[str, float | None]
    """Learning rate of each SAE; None for a user's variant that cannot be built without values."""
    seconds: float
    where: str
    busy: str
    """A remark if the machine was busy while they were measured; otherwise empty."""

    @property
    def memory_bytes(self) -> int:
        """Weights with their gradients and moments, which several processes may share."""
        return COPIES * self.weight_bytes

    @property
    def disk_bytes(self) -> int:
        """The SAEs and checkpoints; a new checkpoint is complete before an old one is deleted."""
        return self.weight_bytes * (1 + (KEPT + 1) * (COPIES - 1))


def dry_run(options: Mapping[str, Any], process: Process) -> Iterator[Estimate]:
    """Time a few steps of each requested run. Name, store, settings and memory are checked."""
    busy = say_busy()
    if options["resume"] is not None:
        raise ConfigInvalid(f"--dry-run is for a new run: leave out either it or --resume {options['resume']}")
    if options["name"] is not None:
        RunFolder.require_free(options["out"], options["name"])
    for request in requests_of(options):
        with Store.open(require_cache(options["cache"])) as store:
            settled = settle(request, store)
            seconds = estimate_seconds(settled, store, process)
            width = store.manifest.width_of
            members = settled.config.members
            weights = sum(weight_bytes(member, width) for member in members) // COPIES
            built = {member.label: build_shapes(member, width) for member in members}
            rates = {label: assembly.optim.lr if assembly else None for label, assembly in built.items()}
            described = settled.describe(store, process.hardware)
            yield Estimate(settled, described, weights, rates, seconds, str(process.device), busy)


def estimate_seconds(settled: Settled, store: Store, process: Process) -> float:
    """Estimated time of a whole run on this machine, set by its slowest process; a collective call. Writes nothing."""
    fleet, data = make_fleet(settled, store, process), settled.config.data
    apply_init(settled, fleet, store, process)
    pool_tokens = min(data.pool_tokens or data.batch_tokens, POOL_BATCHES * data.batch_tokens)
    plan = Plan(settled.plan.sizes, batch_tokens=data.batch_tokens, pool_tokens=pool_tokens, seed=data.seed)
    steps, ranks = min(settled.total_steps, MOST_STEPS), fleet.ranks
    took, began = [], time.perf_counter()
    with report_out_of_memory(process), ExitStack() as stack:
        needs = fleet.needs.values()
        feed = Feed(store, plan, needs, fleet.stats, process.device, ranks.rank, ranks.size, steps)
        stack.callback(feed.close)
        for step in range(steps):
            before = time.perf_counter()
            fleet.step(feed.draw(step))
            if process.device.type == "cuda":
                torch.cuda.synchronize(process.device)
            took.append(time.perf_counter() - before)
            if process.group.any(step >= WARM_UP_STEPS and took[-1] + time.perf_counter() - began > MOST_SECONDS):
                break
    own = statistics.median(took[WARM_UP_STEPS:] or took) * settled.total_steps
    return max(map(float, process.group.texts(str(own))))


def document_of(estimates: list[Estimate]) -> dict[str, Any]:
    """For scripts: what `render` shows, plus every setting."""
    return {
        "runs": [
            {
                "steps": one.settled.total_steps,
                "tokens": one.settled.total_steps * one.settled.plan.batch_tokens,
                "learning_rates": dict(one.rates),
                "unread": list(one.settled.unread),
                "seconds": one.seconds,
                "busy": one.busy,
                "weight_bytes": one.weight_bytes,
                "memory_bytes": one.memory_bytes,
                "disk_bytes": one.disk_bytes,
                "config": dict(one.described),
            }
            for one in estimates
        ]
    }


def render(estimate: Estimate) -> Table:
    """The estimate as a table."""
    settled, cache = estimate.settled, estimate.described["cache"]
    facts = Table.grid(padding=(0, 2))
    saes = [f"{member.label}: {settings_of(member, estimate.rates[member.label])}" for member in settled.config.members]
    rows = {
        "run": estimate.described["recipe"] or counted(len(saes), "SAE"),
        "store": f"{cache['url']} ({cache['model']} on {cache['corpus']})",
        "SAEs": "\n".join([*saes, *settled.unread]),
        "text": settled.remark,
        "steps": f"{settled.total_steps:,} of {settled.plan.batch_tokens:,} tokens",
        "memory": f"{say_size(estimate.memory_bytes)} for weights, gradients and moments of all SAEs",
        "disk": f"{say_size(estimate.disk_bytes)} at most, nearly all of it for checkpoints",
        "time": f"about {say_time(estimate.seconds)}, estimated from a few steps on {estimate.where}"
        + (f"; {estimate.busy}" if estimate.busy else ""),
    }
    for name, value in rows.items():
        facts.add_row(f"[bold]{name}[/bold]", value)
    return facts
