"""From a question to a run: open the store, settle every setting, check that it fits, then begin.

Nothing is written before all checks have passed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console

from ...cache_schema import Manifest, Store
from ...cache_schema.allocator import keep_large_blocks
from ...cache_schema.request import validate_request
from ..ask.recipe import Recipe
from ..ask.records import Ask, DataConfig, RunConfig, read_run_config
from ..data.feed import Feed, joint_request
from ..data.plan import Plan
from ..data.scaling import Stats, stats_from_moments
from ..data.split_sizes import measure_split
from ..disk.checkpoint import Checkpoint, load_checkpoint
from ..engine.fleet import Fleet
from ..errors import ActivationsNotFinite, ConfigInvalid, NothingToTrain, RunFinished
from ..parallel.processes import Group, all_or_none, make_shard
from .budget import Budget, settle_budget
from .checkpoints import Keeper
from .folder import MetricsLog, RunFolder, provenance
from .memory_estimate import require_room
from .metrics import Watch
from .progress import Progress
from .run import Run
from .trackers import Trackers, require_trackers

POOL_BYTES = 2 * 2**30  # of residuals, for each layer
TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Settled:
    """A question with every blank filled in."""

    config: RunConfig
    plan: Plan
    budget: Budget
    recipe: Recipe | None = None


def settle(ask: Ask, store: Store) -> Settled:
    """Fill in what was left open, from what the store holds."""
    data = with_pool(ask.stream(), store.manifest)
    plan = make_plan(data, store)
    budget = settle_budget(ask.length(), plan, store.url)
    course = replace(ask.length(), tokens=budget.tokens)
    members = ask.members(lambda config: config.limits(store.manifest, budget.tokens), store.manifest.layers)
    members = tuple(replace(member, config=member.config.filled(store.manifest)) for member in members)
    return Settled(RunConfig(data, course, members), plan, budget, ask.recipe)


def settle_again(config: RunConfig, steps: int, store: Store) -> Settled:
    """The same for a run that was begun before."""
    plan = make_plan(config.data, store)
    return Settled(config, plan, Budget(steps, steps * config.data.batch_tokens, 0.0, ""))


@contextmanager
def begun(
    settled: Settled, store: Store, out: str, name: str | None, group: Group, device: torch.device, console: Console
) -> Iterator[Run]:
    """A new run, from step 0."""
    fleet, stats = make_fleet(settled, store, group, device)
    described, path = describe(settled, store), ""
    with all_or_none(group):
        if group.rank == 0:
            folder = _make_folder(settled, out, name)
            folder.write_config(described)
            path = str(folder.path)
    folder = RunFolder.at(group.text(path))
    with _assembled(settled, store, folder, fleet, stats, group, device, console, described, None) as run:
        yield run


@contextmanager
def resumed(folder: RunFolder, store: Store, group: Group, device: torch.device, console: Console) -> Iterator[Run]:
    """A run from its last whole checkpoint."""
    described = folder.read_config()
    config = read_run_config(described, str(folder.path / "config.json"))
    if folder.is_finished:
        raise RunFinished(f"{folder.path} is finished: nothing to resume. Evaluate it with: sae-eval {folder.path}")
    settled = settle_again(config, _total_steps(described, folder), store)
    fleet, stats = make_fleet(settled, store, group, device)
    with all_or_none(group):
        found = load_checkpoint(folder.checkpoints)
    if group.rank == 0:
        _report_checkpoint(found, console)
    if found is not None:
        fleet.load_state(found.tensors)
    with _assembled(settled, store, folder, fleet, stats, group, device, console, described, found) as run:
        yield run


def make_fleet(settled: Settled, store: Store, group: Group, device: torch.device) -> tuple[Fleet, dict[int, Stats]]:
    """The SAEs as they are before the first step: what their configs can refuse, they refuse here."""
    keep_large_blocks()
    config = settled.config
    shard = make_shard(device) if config.course.shard_width and group.size > 1 else None
    with all_or_none(group):
        stats = check(settled, store, group, device)
        return Fleet(config.members, stats, settled.budget.steps, device, group, shard), stats


def check(settled: Settled, store: Store, group: Group, device: torch.device) -> dict[int, Stats]:
    """Everything that can be refused before anything is built; returns the statistics of each layer."""
    members = settled.config.members
    require_trackers(settled.config.course.trackers)
    for config in (member.config for member in members):
        config.check(store.manifest)
    request = joint_request([member.config.request() for member in members], TRAIN)
    validate_request(store.manifest, request)
    store.spans(request)
    _require_held_out(settled, store)
    _require_rows(settled, group.size)
    _require_windows(settled, group.size)
    manifest, plan = store.manifest, settled.plan
    pools = 1 if plan.is_one_block else 2
    element = 4 if manifest.model.dtype == "float32" else 2
    window_bytes = manifest.context * manifest.model.d_model * element * len(request.layers)
    shards = group.size if settled.config.course.shard_width else 1
    pool_bytes = pools * plan.max_windows * window_bytes
    require_room(members, manifest.model.d_model, plan.batch_tokens // group.size, pool_bytes, shards, device)
    return {layer: _stats(store, layer) for layer in request.layers}


def _require_held_out(settled: Settled, store: Store) -> None:
    """A run ends with numbers on text it has not seen: that must be there before the first step."""
    manifest, course = store.manifest, settled.config.course
    first, last = manifest.splits[VALIDATION]
    if first == last:
        raise NothingToTrain(
            f"the validation split of {store.url} is empty: a run is measured on it in the end. "
            "Harvest or import more text, so that the split has windows"
        )
    windows = min(max(1, course.validation_tokens // manifest.context), last - first)
    request = joint_request([member.config.request() for member in settled.config.members], VALIDATION)
    store.spans(replace(request, windows=(0, windows)))


def _require_rows(settled: Settled, processes: int) -> None:
    found = settled.plan.batch_tokens
    if found < processes:
        raise ConfigInvalid(f"data.batch_tokens: expected one or more for each of {processes} processes, found {found}")


def _require_windows(settled: Settled, processes: int) -> None:
    """Batches of whole windows have as many as the SAEs need, in every step of every process."""
    wanted = {member.label: member.config.request() for member in settled.config.members}
    wanted = {label: needs.least_windows for label, needs in wanted.items() if needs.windows}
    if not wanted:
        return
    label, least = max(wanted.items(), key=lambda pair: pair[1])
    found = settled.plan.least_windows(settled.budget.steps) // processes
    if found < least:
        raise ConfigInvalid(
            f"{label}: expected {least} whole windows or more in each batch of a process, found {found} "
            f"with data.batch_tokens={settled.plan.batch_tokens}: set a larger one"
        )


def _make_folder(settled: Settled, out: str, name: str | None) -> RunFolder:
    """Of the name that was given, else of the recipe's, else of the next number."""
    if name is None and settled.recipe is not None:
        return RunFolder.create_like(out, settled.recipe.name)
    return RunFolder.create(out, name)


def make_plan(data: DataConfig, store: Store) -> Plan:
    assert data.pool_tokens is not None
    sizes = measure_split(store, TRAIN)
    return Plan(sizes, batch_tokens=data.batch_tokens, pool_tokens=data.pool_tokens, seed=data.seed)


def with_pool(data: DataConfig, manifest: Manifest) -> DataConfig:
    """The size of the pool spelled out. It hangs on the store alone, so that a fleet draws what each would alone."""
    if data.pool_tokens is not None:
        return data
    return replace(data, pool_tokens=max(data.batch_tokens, POOL_BYTES // (2 * manifest.model.d_model)))


def describe(settled: Settled, store: Store) -> dict[str, Any]:
    """config.json."""
    recipe = settled.recipe
    return {
        "format": 1,
        "recipe": recipe and f"{recipe.study}/{recipe.name}",
        "cache": {"url": store.url, "cache_id": store.manifest.cache_id},
        **settled.config.to_json(),
        "total_steps": settled.budget.steps,
        "provenance": provenance(),
    }


@contextmanager
def _assembled(
    settled: Settled,
    store: Store,
    folder: RunFolder,
    fleet: Fleet,
    stats: Mapping[int, Stats],
    group: Group,
    device: torch.device,
    console: Console,
    described: Mapping[str, Any],
    found: Checkpoint | None,
) -> Iterator[Run]:
    """Put the parts together, where a checkpoint left them if there is one; take them apart in the end."""
    config, steps = settled.config, settled.budget.steps
    with ExitStack() as open_things:
        feed = Feed(store, settled.plan, fleet.needs.values(), stats, device, group.rank, group.size, steps)
        open_things.callback(feed.close)
        log, trackers, progress = _make_outlets(settled, folder, fleet, group, console, described, found)
        watch = Watch(log, trackers, progress, feed, group, config.course.metrics_every_steps, steps)
        open_things.callback(watch.close)
        if found is not None:
            watch.go_on(found.standing)
        keeper = Keeper(folder.checkpoints, config.course, fleet, watch, group)
        yield Run(folder, config, steps, store, stats, feed, fleet, watch, keeper, group, device)


def _make_outlets(
    settled: Settled,
    folder: RunFolder,
    fleet: Fleet,
    group: Group,
    console: Console,
    described: Mapping[str, Any],
    found: Checkpoint | None,
) -> tuple[MetricsLog | None, Trackers, Progress]:
    """Where a run tells of itself: only rank 0 has a voice. The log is cut back to the checkpoint."""
    labels, steps = list(fleet.trainees), settled.budget.steps
    if group.rank != 0:
        return None, Trackers((), folder.path, {}), Progress(console, labels, steps, 0, is_quiet=True)
    trackers = Trackers(settled.config.course.trackers, folder.path, described)
    progress = Progress(console, labels, steps, fleet.steps_taken, is_quiet=False)
    log = MetricsLog(folder.metrics)
    log.cut(found.standing.metrics_bytes if found else 0)
    return log, trackers, progress


def _stats(store: Store, layer: int) -> Stats:
    """A layer's statistics; values that are no finite numbers end here, with their shard."""
    stats = stats_from_moments(store.moments(layer))
    if bool(stats.scale.isfinite().all() and stats.mean.isfinite().all()):
        return stats
    shards = range(store.manifest.shards)
    broken = [shard for shard in shards if not torch.tensor(store.shard_moments(layer, shard).mean).isfinite().all()]
    raise ActivationsNotFinite(
        f"{store.url}: activations of layer {layer} are not all finite numbers, in shard "
        f"{', '.join(map(str, broken[:8])) or 'unknown'}. Harvest again in a dtype that can hold them, such as bfloat16"
    )


def _total_steps(described: Mapping[str, Any], folder: RunFolder) -> int:
    steps = described.get("total_steps")
    if not isinstance(steps, int) or steps < 1:
        raise ConfigInvalid(f"{folder.path / 'config.json'}: expected total_steps of at least 1, found {steps!r}")
    return steps


def _report_checkpoint(found: Checkpoint | None, console: Console) -> None:
    if found is None:
        console.print("no checkpoint was written yet: beginning at step 0")
        return
    for complaint in found.complaints:
        console.print(f"a checkpoint is damaged and was passed over: {complaint}", style="yellow", markup=False)
    console.print(f"going on after step {found.standing.step}")
