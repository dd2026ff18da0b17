"""Train the runs that a command's options, or a Python caller's, ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Any, cast

from rich.console import Console

from ..cache_schema import Store, StoreMissing
from ..cache_schema.disk_and_cloud_files import LocalFiles
from ..cache_schema.launcher_environment import is_launched
from ..cache_schema.numbers_in_words import counted
from ..cache_schema.sites import RESID, say_place
from .config.parse_settings import ALIASES, parse_grid, parse_settings
from .config.recipe import find_recipes, studies
from .config.run_config import Member, RunRequest
from .disk.write_and_load_checkpoints import list_checkpoints
from .errors import ConfigInvalid, MemoryTooSmall, RunInterrupted, StoppedElsewhere, resume_command
from .kit.variant_registry import names
from .parallel.processes import SOLO, join
from .run.checkpoints_and_signals import catch_signals
from .run.fill_config_from_store import Settled, settle
from .run.find_and_load_sae import find_sae
from .run.log_and_show_progress import Output
from .run.process import Process
from .run.run_folder import RunFolder, cache_of
from .run.start_or_resume import Run, begin_run, resume_run
from .run.validate_and_save_results import Outcome, conclude
from .sae.kernels.dense_products import product_on

_OPTIONS = {"layer": "layer", "width": "width", "k": "k", "lr": "optim.lr", "seed": "seed"}
_OPTIONS |= {"tokens": "course.tokens", "epochs": "course.epochs"}

FEW_READ = 0.98  # warn if SAEs on whole windows read less than this share of the text


@contextmanager
def open_process(device: str, console: Console, spread: bool = False, is_watched: bool = False) -> Iterator[Process]:
    """Join the launch's other processes, if any; with `spread`, SAEs are divided among them."""
    if not isinstance(console.file, Output):
        console.file = cast(IO[str], Output(console.file))
    group, place = join(device, has_sums=not spread)
    if spread and group.size == 1:
        console.print("--spread divides SAEs among several processes, but there is only one: start it with torchrun")
    process = Process(group, SOLO if spread and group.size > 1 else group, place, console, is_watched)
    try:
        yield process
    except RunInterrupted:  # in all processes
        group.close()
        raise
    except BaseException as error:
        group.leave(130 if isinstance(error, KeyboardInterrupt) else 1)
        raise
    group.close()


def train_all(options: Mapping[str, Any], process: Process) -> Iterator[Outcome]:
    """Train the runs that the options (named as in `sae-train`) ask for, one after another.

    Only the first of several processes yields results.
    """
    if options["resume"] is not None:
        others = {f"--{name}": options[name] for name in ("variant", "recipe", "set", "grid", "name", "init")}
        others["--with-baselines"] = options["with_baselines"] or None
        others |= {f"--{name}": options[name] for name in _OPTIONS}
        if given := [option for option, value in others.items() if value not in (None, ())]:
            raise ConfigInvalid(
                f"--resume {options['resume']} keeps the settings of that run: leave out {', '.join(given)}"
            )
        outcomes = [_resume(RunFolder.open(options["out"], options["resume"]), options["cache"], process)]
    else:
        requests = requests_of(options)
        cache, out, name = require_cache(options["cache"]), options["out"], options["name"]
        outcomes = (start(request, cache, out, name, process) for request in requests)
    yield from (outcome for outcome in outcomes if outcome is not None)


def requests_of(options: Mapping[str, Any]) -> list[RunRequest]:
    """The new runs that the options ask for."""
    settings, points = _settings(options), parse_grid(options["grid"])
    requests = find_requests(options["variant"], options["recipe"], options["name"], settings, points)
    init = None if options["init"] is None else str(find_sae(options["init"], options["out"]))
    return [replace(request, baselines=options["with_baselines"], init=init) for request in requests]


def start(request: RunRequest, cache: str, out: str, name: str | None, process: Process) -> Outcome | None:
    """Train a new run, from its first step to its results."""
    with Store.open(cache) as store:
        settled = settle(request, store)
        with begin_run(settled, store, process, out, name) as run:
            _announce(run, settled)
            return train(run)


def _resume(folder: RunFolder, cache: str | None, process: Process) -> Outcome | None:
    url, cache_id = cache_of(folder)
    try:
        store = Store.open(cache or url, expect_cache_id=cache_id)
    except StoreMissing:
        if cache is not None:
            raise
        raise ConfigInvalid(
            f"{folder.path} was trained on the store {url}, which is no longer there: give its location with --cache"
        ) from None
    with store, resume_run(folder, store, process) as run:
        return train(run)


def train(run: Run) -> Outcome | None:
    """Take the remaining steps, then conclude the run; rank 0 returns the results."""
    try:
        run.watch.begin()
        with catch_signals(is_launched()) as caught:
            for step in range(run.fleet.steps_taken, run.total_steps):
                _take_step(run, step)
                run.saver.save_if_due(step + 1, run.total_steps, caught)
            run.watch.end()
        return conclude(run)
    except (StoppedElsewhere, MemoryTooSmall) as error:
        command = resume_command(run.folder.path)
        state = f"The last checkpoint is intact. Resume with: {command}"
        if not list_checkpoints(run.folder.checkpoints):
            state = "No checkpoint had been written"
            if run.folder.has_steps:
                state += f": the log is in {run.folder.path}. Start again from step 0 with the same settings: {command}"
        raise type(error)(f"{error}. {state}") from error


def _take_step(run: Run, step: int) -> None:
    """A separate function so that each draw is released at the end of its step: the feed must free its buffers."""
    draw = run.feed.draw(step)
    run.watch.observe(step, draw, run.fleet.step(draw), run.fleet.diverged)
    for news in run.fleet.take_news():
        if run.process.team.rank == 0:
            run.process.console.print(news, style="yellow")


def _announce(run: Run, settled: Settled) -> None:
    """Print what will be trained, and whatever differs from what was requested; a collective call."""
    own = {}
    for label, trainee in run.fleet.trainees.items():
        asked = trainee.sae.encoder_product
        own[label] = {
            "process": run.process.group.rank,
            "cut": sorted(trainee.assembly.cut_short(run.total_steps)),
            "lr": trainee.assembly.optim.lr,
            "products": (asked, product_on(run.process.device, asked)),
        }
    by_label = run.process.collect(own, run.labels)
    if not run.process.is_first:
        return
    say, plan, processes = run.process.console.print, run.feed.plan, run.process.group.size
    say(f"{run.folder.path}: {settled.remark}, {counted(run.total_steps, 'step')} on {run.process.device}")
    for member in run.config.members:
        sae = by_label[member.label]
        where = f", in process {sae['process']}" if run.process.is_spread else ""
        say(f"  {member.label}: {settings_of(member, sae['lr'])}{where}")
    for line in settled.unread:
        say(line, style="yellow")
    windowed = any(needs.windows for needs in run.config.needs().values())
    if windowed and (share := plan.windows_taken()) < FEW_READ:
        say(
            f"SAEs on whole windows read {share:.0%} of the text: a batch of {plan.batch_tokens:,} tokens holds only "
            f"whole windows of {run.store.manifest.context}; set data.batch_tokens to a multiple of that "
            "to leave out less"
        )
    for asked, given in sorted({tuple(pair) for sae in by_label.values() for pair in sae["cut"]}):
        say(f"the run is short: a warm-up or onset of {asked:,} steps is cut to {given:,}")
    for asked, given in sorted({tuple(sae["products"]) for sae in by_label.values()}):
        if asked != given:
            labels = ", ".join(label for label, sae in by_label.items() if tuple(sae["products"]) == (asked, given))
            say(f"{labels}: encoder_product={asked} is computed in {given}: this machine has no fast {asked} products")
    if processes > 1 and not isinstance(run.store.files, LocalFiles):
        say(
            f"each of {processes} processes reads {run.store.url} separately: to read it only once, copy the store to "
            "a local disk, where the page cache serves all processes of a host"
        )
    for layer, stats in run.fleet.stats.items():
        if stats.massive is not None and stats.massive.massive:
            say(f"{say_place(layer)}: {stats.massive}: left out (--set data.massive_norms=inf includes them)")


def settings_of(member: Member, rate: float | None) -> str:
    """In words: the settings in which SAEs usually differ, and the learning rate."""
    shown = (*(["hook"] if member.config.needs().hook != RESID else []), "layer", "layers", "width", "k", "seed")
    unread = member.config.unread()
    values = {key: getattr(member.config, key, None) for key in shown if key not in unread}
    if rate is not None and "optim.lr" not in unread:
        values["lr"] = f"{rate:.3g}"
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def find_requests(
    variants: tuple[str, ...],
    recipe: str | None,
    name: str | None,
    settings: dict[str, Any],
    points: list[dict[str, Any]],
) -> list[RunRequest]:
    """The runs to train, one after another."""
    if variants and recipe is not None:
        raise ConfigInvalid(f"--recipe {recipe} already names the SAEs to train: leave out --variant")
    if variants:
        return [RunRequest.of_variants(variants, settings, points)]
    if recipe is None:
        raise ConfigInvalid(
            f"expected --variant NAME (one of {', '.join(names())}), "
            f"--recipe STUDY/RUN (of {', '.join(studies())}), or --resume NAME"
        )
    found = find_recipes(recipe)
    if name is not None and len(found) > 1:
        raise ConfigInvalid(f"--name {name} is for a single run, but the study {recipe} has {len(found)}: leave it out")
    return [RunRequest.of_recipe(one, settings, points) for one in found]


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of the command line. One given under two names must have the same value in both."""
    settings = {key: options[name] for name, key in _OPTIONS.items() if options[name] is not None}
    for name, value in parse_settings(options["set"]).items():
        key = ALIASES.get(name, name)
        if settings.setdefault(key, value) != value:
            raise ConfigInvalid(f"expected one value of {key}, found {settings[key]!r} and {value!r}: leave out one")
    return settings


def require_cache(cache: str | None) -> str:
    if cache is None:
        raise ConfigInvalid("expected --cache URL, the store to train on")
    return cache
