"""Set up a settled run: check it, build its SAEs, create its folder, and connect all its parts.

Nothing is written before all checks have passed.

With `--spread` each process has its own SAEs and reads the store itself, but only its SAEs' layers. All read the same
pieces in the same order at about the same time, so the disk is read once and the page cache serves the rest; only
decoding is repeated, on each process's own cores. A single reader would have to copy each block between processes and
hold all layers, and if it failed, so would all processes.
"""

from __future__ import annotations

import gc
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch

from ...cache_schema import Store
from ...cache_schema.keep_freed_memory import keep_large_blocks
from ..config.run_config import Member, RunConfig
from ..data.batch_stream import Feed
from ..data.device_copies import take_device
from ..disk.write_and_load_checkpoints import Standing, load_checkpoint
from ..engine.fleet_of_saes import Fleet, out_of_memory
from ..errors import ConfigInvalid, MemoryTooSmall, NothingToTrain
from ..parallel.processes import SOLO, all_or_none
from .after_run import Onlookers
from .checkpoints_and_signals import Saver
from .fill_config_from_store import Settled, settle_again
from .fits_in_memory import weight_bytes
from .init_from_trained_sae import init_fleet, require_unchanged
from .log_and_show_progress import Progress, Trackers, Watch
from .preflight import check
from .process import Process
from .run_folder import LOST, MetricsLog, RunFolder, provenance


@dataclass(frozen=True, eq=False)
class Run:
    """A run in progress with all its parts: one stream, one fleet, one folder."""

    folder: RunFolder
    config: RunConfig
    total_steps: int
    store: Store
    feed: Feed
    fleet: Fleet
    watch: Watch
    saver: Saver
    process: Process

    @property
    def labels(self) -> tuple[str, ...]:
        """All SAEs of the run; the fleet holds those of this process."""
        return tuple(member.label for member in self.config.members)

    def require_folder(self) -> None:
        """Refuse to write results if the folder was removed or replaced; only rank 0, which has the log, can tell."""
        if self.watch.log is not None:
            self.watch.log.require_ours()


@contextmanager
def begin_run(settled: Settled, store: Store, process: Process, out: str, name: str | None) -> Iterator[Run]:
    """Start a new run, at step 0."""
    fleet, path = make_fleet(settled, store, process), ""
    apply_init(settled, fleet, store, process)
    with all_or_none(process.group):
        if process.is_first:
            folder = RunFolder.create(out, name, like=settled.recipe and settled.recipe.name)
            folder.begin(settled.describe(store, process.hardware))
            path = str(folder.path)
    folder = RunFolder(process.group.texts(path)[0])
    try:
        with (
            report_out_of_memory(process),
            _take_log(folder, process) as log,
            _open(settled, store, process, folder, fleet, log, None) as run,
        ):
            yield run
    except MemoryTooSmall:
        if process.is_first and not folder.has_steps:
            shutil.rmtree(folder.path)  # it holds nothing to look at or resume
        raise


@contextmanager
def resume_run(folder: RunFolder, store: Store, process: Process) -> Iterator[Run]:
    """Resume a run from its last complete checkpoint."""
    _require_unfinished(folder)
    settled = settle_again(folder, store)
    with _take_log(folder, process) as log:
        fleet = make_fleet(settled, store, process)
        standing = _load_checkpoint(folder, fleet, settled.total_steps, process)
        if standing is None:
            if settled.init is not None:
                with all_or_none(process.group):
                    require_unchanged(settled.init)
            apply_init(settled, fleet, store, process)
        with report_out_of_memory(process), _open(settled, store, process, folder, fleet, log, standing) as run:
            with all_or_none(process.group):
                if log is not None:
                    _report_resumption(folder, log.lost_bytes, process)
            yield run


def _report_resumption(folder: RunFolder, lost_bytes: int, process: Process) -> None:
    """Record the resumption in config.json, and print what has changed."""
    here = provenance(process.hardware) | ({LOST: lost_bytes} if lost_bytes else {})
    if others := folder.record_resumption(here):
        process.console.print(f"changed since before: {', '.join(others)}", style="yellow", markup=False)
    if lost_bytes:
        loss = f"{folder.metrics} lacks its last {lost_bytes:,} bytes before the checkpoint: curves have a gap there"
        process.console.print(loss, style="yellow", markup=False)


def _require_unfinished(folder: RunFolder) -> None:
    if folder.is_finished:
        command = shlex.join(["sae-eval", str(folder.path)])
        raise NothingToTrain(f"{folder.path} is finished: nothing to resume. Evaluate it with: {command}")


@contextmanager
def _take_log(folder: RunFolder, process: Process) -> Iterator[MetricsLog | None]:
    """The log, on rank 0. While it is open, no other launch can train the run, so its progress may be read."""
    with ExitStack() as stack:
        log = None
        with all_or_none(process.group):
            if process.is_first:
                log = stack.enter_context(closing(MetricsLog(folder.metrics)))
                _require_unfinished(folder)  # another process may have just finished it
                if not log.is_locked:
                    no_locks = "no locks on this disk, so nothing keeps a second process from training this run as well"
                    process.console.print(f"{folder.path}: {no_locks}", style="yellow", markup=False)
        yield log


@contextmanager
def report_out_of_memory(process: Process) -> Iterator[None]:
    """Turn an out-of-memory error of the device into a message."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(f"{process.device} has no memory left", error) from None


def make_fleet(settled: Settled, store: Store, process: Process) -> Fleet:
    """Build the SAEs as they are before the first step. Refuses runs that cannot work."""
    take_device(process.device)
    keep_large_blocks()
    gc.collect()  # leftovers of an earlier run in this process, which would count against free memory
    if process.device.type == "cuda":
        torch.cuda.empty_cache()
        empty_host_cache()
        # Recording CUDA graphs takes the peak since this point for the memory that steps need.
        torch.cuda.reset_peak_memory_stats(process.device)
    is_split = settled.config.course.shard_width and process.group.size > 1
    rows, split = (SOLO, process.team) if is_split else (process.team, None)
    with all_or_none(process.group), report_out_of_memory(process):
        members = members_of(settled.config, store.manifest.model.d_model, process)
        stats = check(settled, store, members, rows.size, 1 if split is None else split.size, process.device)
        configs = {member.label: member.config for member in members}
        return Fleet(configs, stats, settled.total_steps, process.device, rows, split, process.is_spread)


def empty_host_cache() -> None:
    """Give back page-locked memory, which checkpoints use. torch before 2.12 has no public name for this."""
    empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()


def apply_init(settled: Settled, fleet: Fleet, store: Store, process: Process) -> None:
    """Before the first step, start the SAEs from a trained one if --init asks for it."""
    if settled.init is not None:
        with all_or_none(process.group):
            init_fleet(settled.init, fleet, store.manifest)


def _load_checkpoint(folder: RunFolder, fleet: Fleet, total_steps: int, process: Process) -> Standing | None:
    """Restore the fleet from the last complete checkpoint."""
    found = load_checkpoint(folder.checkpoints, fleet.trainees, process.group, folder.run_id, total_steps)
    say = process.console.print if process.is_first else (lambda *_, **__: None)
    if found is None:
        say("no checkpoint found: starting at step 0")
        return None
    for complaint in found.complaints:
        say(f"skipped a checkpoint: {complaint}", style="yellow", markup=False)
    say(f"continuing after step {found.standing.step}")
    with all_or_none(process.group):
        fleet.load_state(found.tensors, found.standing.step)
    return found.standing


@contextmanager
def _open(
    settled: Settled,
    store: Store,
    process: Process,
    folder: RunFolder,
    fleet: Fleet,
    log: MetricsLog | None,
    standing: Standing | None,
) -> Iterator[Run]:
    """Connect the parts, restored from the checkpoint if there is one; close them at the end."""
    config, ranks, steps = settled.config, fleet.ranks, settled.total_steps
    labels, every = [member.label for member in config.members], config.course.metrics_every_steps
    trackers, progress, onlookers, run_id = None, None, None, ""
    with ExitStack() as stack:
        needs = fleet.needs.values()
        feed = Feed(store, settled.plan, needs, fleet.stats, process.device, ranks.rank, ranks.size, steps)
        stack.callback(feed.close)
        with all_or_none(process.group):
            if process.is_first:  # another host may not see config.json yet
                trackers = Trackers(config.course.trackers, folder.path, folder.read_config())
                stack.callback(trackers.close)
                progress = Progress(process.console, labels, steps, fleet.steps_taken)
                stack.callback(progress.close)
                onlookers = Onlookers(folder.path, process.console.print) if process.is_watched else None
                run_id = folder.run_id
            if log is not None:
                log.cut(standing.metrics_bytes if standing else 0)
        watch = Watch(log, trackers, progress, feed, process, labels, every, steps, onlookers)
        if standing is not None:
            watch.resume(standing)
        saver = Saver(folder.checkpoints, config.course, fleet, watch, process, run_id)
        stack.callback(saver.close)
        yield Run(folder, config, steps, store, feed, fleet, watch, saver, process)


def members_of(config: RunConfig, d_model: int, process: Process) -> tuple[Member, ...]:
    """The SAEs that this process trains: all, or its share if they are spread."""
    if not process.is_spread:
        return config.members
    if config.course.shard_width:
        raise ConfigInvalid(
            "course.shard_width gives each process a part of every SAE, --spread whole SAEs: choose one"
        )
    processes, found = process.group.size, len(config.members)
    if found < processes:
        raise ConfigInvalid(
            f"--spread: expected at least one SAE for each of {processes} processes, found {found}: "
            "start fewer processes, or leave out --spread so that all of them work on every SAE"
        )
    return deal_members(config.members, processes, d_model)[process.group.rank]


def deal_members(members: Sequence[Member], processes: int, d_model: int) -> list[tuple[Member, ...]]:
    """The largest SAEs first, each to the process with the least so far; on a tie, to one that reads its layers anyway.

    The first process gets SAEs that train on single tokens, if any: it measures the shuffling of those.
    """
    parts: list[list[Member]] = [[] for _ in range(processes)]
    sizes = {member.label: weight_bytes(member, lambda _: d_model) for member in members}
    for member in sorted(members, key=lambda one: -sizes[one.label]):
        places = set(member.config.needs().layers)

        def cost(part: list[Member], places: set = places) -> tuple[int, int]:
            known = {place for one in part for place in one.config.needs().layers}
            return sum(sizes[one.label] for one in part), len(places - known)

        min(parts, key=cost).append(member)
    parts.sort(key=lambda part: all(one.config.needs().windows for one in part))
    return [tuple(member for member in members if member in part) for part in parts]
