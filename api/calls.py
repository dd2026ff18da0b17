"""The three verbs. `saemill.harvest`, `.train` and `.evaluate` are these functions, and the packages of those names.

Each takes the words of its command as keyword arguments: `--attention-layers` is `attention_layers`, what may be
given several times takes a list, `set` and `grid` also a dict. Errors are raised, as each package names them.
"""

from __future__ import annotations

from typing import Any

from ..cache_schema.cli import open_console
from ..cache_schema.errors import StoreUnfinished
from ..cache_schema.launcher_environment import count_processes
from ..evaluate.output.pictures import draw
from ..evaluate.run.command import measure
from ..harvest.cli import make_config
from ..harvest.progress import Watch
from ..train.cli import folder_of, warnings_of
from ..train.config.recipe import find_recipes
from ..train.errors import ConfigInvalid
from ..train.run.after_run import after_run
from ..train.train_runs import open_process, train_all
from .command_words import words_of
from .run import Run
from .store import Store
from .table import Table


def harvest(**words: Any) -> Store:
    """Run a language model over a corpus once, or go on with it; returns the store. `sae-harvest --help`
    lists the words."""
    from ..harvest.run import harvest as run_harvest  # late: training and stores have no use for transformers

    config = make_config(words_of("harvest", (), words))
    finished = run_harvest(config)
    if finished.committed < finished.shards:
        raise StoreUnfinished(
            f"{finished.committed} of {finished.shards} shards of {finished.url} are committed, and others belong to "
            "other workers: open it with Store(...) when they have ended"
        )
    return Store(config.out)


def train(**words: Any) -> Run:
    """Train the SAEs of one run, or go on with it; returns the run. `sae-train --help` lists the words."""
    read = words_of("train", (), words)
    plots, device = read["plots"], read["device"]
    if read["recipe"] is not None and len(found := find_recipes(read["recipe"])) > 1:
        raise ConfigInvalid(
            f"recipe: expected one run, like {read['recipe']}/{found[0].name}, found a study of {len(found)}: "
            "name one, or use sae-study"
        )
    console = open_console(highlight=False, soft_wrap=True, markup=False)
    if (launched := count_processes()) > 1:
        raise ConfigInvalid(f"expected one process, found {launched}: several train with sae-train")
    with open_process(device, console, read["spread"], is_watched=plots) as process:
        (outcome,) = train_all(read, process)
    for line in filter(None, [*warnings_of(outcome), outcome.say_diverged()]):
        console.print(line)
    folder = folder_of(outcome)
    if plots:
        after_run(folder, console.print)
    return Run(folder)


def evaluate(*targets: Any, **words: Any) -> Table:
    """Evaluate runs, SAEs' folders or repositories of the Hub; returns a table. `sae-eval --help` lists the words.

    A target that cannot be found is an error; SAEs that cannot be read and what could not be measured are told below
    the table.
    """
    read = words_of("evaluate", targets, words)
    rows, _, absent = measure(read, _refuse)
    if read["plots"]:
        draw(rows, read["compare"], Watch().say)
    return Table(rows, absent)


def _refuse(problem: Exception) -> None:
    raise problem
