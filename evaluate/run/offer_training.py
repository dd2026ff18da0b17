"""Offer to train a missing run that has a recipe of its name, if there is a terminal to ask at.

The README names such a run, `run_4`. Without a terminal or a store to train on, the command fails with the
`sae-train` command to use.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import click

from ...cache_schema import Store, StoreMissing
from ...cache_schema.numbers_in_words import say_time
from ...train.config.recipe import find_recipes
from ...train.config.run_config import RunRequest
from ...train.dry_run import estimate_seconds
from ...train.errors import TrainError
from ...train.run.fill_config_from_store import settle
from ...train.run.run_folder import run_names
from ...train.train_runs import open_process, start
from ..errors import EvalError, TargetUnknown
from ..output.pictures import after_run
from .console_table import make_console
from .find_saes_to_evaluate import FIRST, command_to_train, find_places, known_store, studies_with

LONG_SECONDS = 600


def offer_training(targets: Sequence[str], runs: Path, cache: str | None, device: str, plots: bool) -> None:
    """Train each missing run that has a recipe, if the user agrees."""
    store = cache or known_store()
    for target in dict.fromkeys(targets):
        if store and _is_missing(target, runs) and (found := studies_with(target)):
            _offer(f"{found[0]}/{target}", target, runs, store, device, plots)


def _is_missing(target: str, runs: Path) -> bool:
    if "/" in target:
        return False
    try:
        find_places(target, runs)
    except (EvalError, TrainError) as error:  # problems with an existing run are reported with the others' results
        return isinstance(error, TargetUnknown)
    return False


def _offer(recipe: str, name: str, runs: Path, cache: str, device: str, plots: bool) -> None:
    """Say what would be trained and how long it takes; train it if the user agrees."""
    console = make_console(is_stderr=True)
    request = RunRequest.of_recipe(find_recipes(recipe)[0])
    words = {"--recipe": recipe, "--cache": cache, "--out": str(runs), "--name": name}
    command = shlex.join(["sae-train", *chain.from_iterable(words.items()), *([] if plots else ["--no-plots"])])
    try:
        store = Store.open(cache)
    except StoreMissing:
        return  # the error that follows gives the command
    with store, open_process(device, console) as process:
        console.print(f"no run {name!r} in {runs}, but there is a recipe {recipe}: timing a few steps of it on {cache}")
        if not run_names(runs):
            console.print(f"to train an SAE of your own instead: {command_to_train(FIRST, cache, runs)}")
        settled = settle(request, store)
        seconds = estimate_seconds(settled, store, process)
        epoch = settled.plan.steps_in(1)
        if seconds > LONG_SECONDS and epoch < settled.total_steps:
            epoch_time = say_time(seconds * epoch / settled.total_steps)
            console.print(f"one epoch takes about {epoch_time}: {command} --epochs 1")
        saes = len(settled.config.members)
        what = f"{saes} SAE{'s' * (saes > 1)} side by side, {settled.total_steps:,} steps, about {say_time(seconds)}"
        if not click.confirm(f"Train it now, then continue? {what}", default=seconds <= LONG_SECONDS, err=True):
            return
    with open_process(device, console, is_watched=plots) as process:
        console.print(f"$ {command}", style="bold")
        outcome = start(request, cache, str(runs), name, process)
        if outcome is not None and outcome.diverged:
            console.print(outcome.say_diverged())
    if outcome is not None and plots:
        after_run(runs / name, console.print)
