"""`sae-study`: a study from its recipes to its table.

1. Train each run with the command a person would type; finished runs are kept, others resume.
2. Train runs that compare SAEs, such as `headline`, with several seeds.
3. For the run that decides, train its base at half the length too: `growth` in the table shows if the budget counts.
4. Evaluate with core, the study's own measures, and what else a run asks for.
5. Write table.md and table.json of the study's finished runs, with each SAE's differences from its base and controls,
   their intervals, and a correction for their number. List all problems (a run without steps, NaN, scores that take
   no learning), and exit with 1 if there are any.

The run `decisive`, five seeds at equal sparsity, takes longer than all others together: `--only decisive` runs it.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ..cache_schema.cli import as_json, print_json
from ..cache_schema.disk_and_cloud_files import name_full_disk
from ..cache_schema.launcher_environment import count_processes
from ..evaluate import evals
from ..evaluate.cli import main as sae_eval
from ..evaluate.context.write_and_read_results import RESULTS
from ..evaluate.errors import EvalError
from ..evaluate.run.command import id_of_store, make_configs, report_errors
from ..evaluate.run.console_table import make_console
from ..train.cli import main as sae_train
from ..train.cli_support import beginning_with
from ..train.config.recipe import HALF, Recipe, find_recipes, half_of, runs_of, studies
from ..train.disk.atomic_files import read_json, take_lock, write_json
from ..train.errors import NonFiniteLoss, TrainError, TrainingDiverged
from ..train.run.run_folder import RunFolder, cache_of
from .compare_and_decide import DECISIVE
from .run_results import Line, Results, curve_by_label, families, read_lines, titles_of
from .tables import MEASURES, rows_of, write_tables

LOCK = ".lock"  # in the study's folder
AS_OFTEN = ("--epochs", "1000")
"""As many epochs as the requested tokens take."""
DIVERGED = (
    "training diverged, and no SAE of the run has a result. The same command would diverge again: choose a lower "
    "learning rate (--set optim.lr=) and another --out"
)


@dataclass(frozen=True)
class Course:
    """What all runs of a study share."""

    cache: str
    out: Path
    options: tuple[str, ...]
    """Options of sae-train, such as --tokens 1M."""
    seeds: int | None
    """How many seeds runs that compare SAEs have; None: the recipe's number."""
    baselines: bool = False
    """Whether runs that compare SAEs also train sanity baselines."""
    evaluation: tuple[str, ...] = ()
    """Settings of evaluations, such as sparse_probing.data=stdlib. Another call may give others."""


EXAMPLES = """\b
Examples:
  sae-study attention --cache ./store
  sae-study --cache ./store --tokens 1M --width 512 --seeds 2
  sae-study tiered --cache ./store --json | jq '.studies[].saes'
"""


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument(
    "names", nargs=-1, metavar="[STUDY]...", shell_complete=lambda _, __, word: beginning_with(word, studies())
)
@click.option("--cache", required=True, metavar="URL", help="The store, with attention of layers L-2..L+1.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("study_runs"), show_default=True, metavar="DIR")
@click.option("--tokens", metavar="N", help="Tokens for each run, such as 1M.  [default: the recipe's]")
@click.option("--epochs", metavar="N", help="How many times the store may be read.")
@click.option("--width", metavar="F", help="SAE latents.  [default: the recipe's, at most 16 times the residual width]")
@click.option("--only", metavar="RUN,RUN", help="Only these runs of the study.  [default: all but decisive]")
@click.option(
    "--seeds", type=click.IntRange(1), help="Seeds for runs that compare SAEs.  [default: the recipe's, 3 or 5]"
)
@click.option(
    "--with-baselines", "baselines", is_flag=True, help="Train sanity baselines along with the SAEs that are compared."
)
@click.option("--evals", "only_evals", metavar="NAMES", help="Only these evaluations of each run.  [default: all]")
@click.option("--set", "settings", multiple=True, metavar="A.B=V", help="A setting for every run.")
@click.option("--eval-set", "evaluation", multiple=True, metavar="A.B=V", help="A setting for every evaluation.")
@as_json()
def main(
    names: tuple[str, ...],
    cache: str,
    out: Path,
    tokens: str | None,
    epochs: str | None,
    width: str | None,
    only: str | None,
    seeds: int | None,
    baselines: bool,
    only_evals: str | None,
    settings: tuple[str, ...],
    evaluation: tuple[str, ...],
    is_json: bool,
) -> None:
    """Train, evaluate and compare all runs of STUDY, or of every study."""
    with report_errors(refuse):
        if count_processes() > 1:
            refuse(
                "expected one process, found several, as torchrun starts them: start a study without torchrun, and use "
                "torchrun with sae-train --recipe STUDY/RUN for a run that is too large for one process"
            )
    given = {"--tokens": tokens, "--epochs": epochs, "--width": width}
    options = [word for name, value in given.items() if value is not None for word in (name, value)]
    options += [word for setting in settings for word in ("--set", setting)]
    with report_errors(lambda message: refuse(f"--eval-set: {message.removeprefix('error: ')}")):
        make_configs(evals.ALL, evaluation)  # refuses unknown settings before anything is trained
    results: dict[Path, list[Line]] = {}
    try:
        # With --json, what the commands run here print must not mix with the document.
        with report_errors(refuse), redirect_stdout(sys.stderr) if is_json else nullcontext():
            chosen = {study: restrict(choose(study, only), only_evals) for study in names or studies()}
            for line in unused(list(chain.from_iterable(chosen.values())), only_evals, evaluation, seeds, baselines):
                click.echo(line, err=True)
            for study, recipes in chosen.items():
                course = Course(cache, out / study, tuple(options), seeds, baselines, evaluation)
                with name_full_disk(f"writing into {course.out}"):
                    results[course.out] = carry_out(recipes, course, make_console())
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    problems = [
        f"{folder.name}/{line.run}/{line.label}: {problem}"
        for folder, lines in results.items()
        for line in lines
        for problem in line.problems
    ]
    if is_json:
        found = [{"folder": str(folder), "saes": rows_of(lines)} for folder, lines in results.items()]
        print_json({"studies": found, "problems": problems})
    for problem in problems:
        click.echo(f"failed: {problem}", err=True)
    sys.exit(1 if problems else 0)


def refuse(message: str) -> None:
    raise click.ClickException(message.removeprefix("error: "))


def choose(study: str, only: str | None) -> list[Recipe]:
    """The named runs of a study; None: all except the one that decides."""
    if only is None:
        return [recipe for recipe in runs_of(study) if recipe.name != DECISIVE]
    named = [name for name in dict.fromkeys(name.strip() for name in only.split(",")) if name]
    if not named:
        raise click.ClickException(
            f"--only {only!r}: expected names of runs, found none: give one of "
            f"{', '.join(recipe.name for recipe in runs_of(study))}, or leave it out"
        )
    for name in named:
        if name.endswith(HALF):
            whole = name.removesuffix(HALF)
            raise click.ClickException(
                f"--only {name}: expected a run with something to compare, found the base of {whole} alone. Ask for "
                f"{whole}, which trains it too, or train it alone: sae-train --recipe {study}/{name}"
            )
    return [recipe for name in named for recipe in find_recipes(f"{study}/{name}")]


def restrict(recipes: Sequence[Recipe], only_evals: str | None) -> list[Recipe]:
    """The runs with the named evaluations alone; None: with all of theirs."""
    if only_evals is None:
        return list(recipes)
    named = [name.strip() for name in only_evals.split(",")]
    for name in named:
        evals.load(name)  # the error for an unknown one suggests what was meant
    found = [replace(recipe, evals=tuple(name for name in recipe.evals if name in named)) for recipe in recipes]
    if not any(recipe.evals for recipe in found):
        known = sorted({name for recipe in recipes for name in recipe.evals})
        raise click.ClickException(
            f"--evals {only_evals}: the chosen runs of {recipes[0].study} have only {', '.join(known)}; "
            "`sae-eval RUN --evals NAME` adds others afterwards"
        )
    return found


def unused(
    recipes: Sequence[Recipe], only_evals: str | None, evaluation: Sequence[str], seeds: int | None, baselines: bool
) -> Iterator[str]:
    """A line for each option that none of these runs uses."""
    measured = {eval_id for recipe in recipes for eval_id in recipe.evals}
    named = [name.strip() for name in only_evals.split(",")] if only_evals else []
    yield from (f"--evals {name}: none of these runs has it" for name in named if name not in measured)
    for setting in evaluation:
        if (eval_id := setting.partition(".")[0]) not in measured:
            yield f"--eval-set {setting}: none of these runs is measured by {eval_id}"
    options = {"--seeds": seeds is not None, "--with-baselines": baselines}
    if not any(recipe.seeds > 1 for recipe in recipes):
        yield from (f"{name}: none of these runs compares seeds" for name, is_given in options.items() if is_given)


def carry_out(recipes: Sequence[Recipe], course: Course, console: Console) -> list[Line]:
    """Carry out one study; what is done already is kept."""
    with _lock(course.out) as is_locked:
        keep_course(course, is_locked)
        return _carry_out(recipes, course, console)


@contextmanager
def _lock(out: Path) -> Iterator[bool]:
    """Let one process at a time work in this folder, or two would share a table. Yields whether the disk has locks."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open("ab")
    except OSError as error:
        raise click.ClickException(f"{out} cannot be created ({error.strerror}): choose another --out") from None
    with file:
        is_locked = take_lock(file)
        if is_locked is None:
            raise click.ClickException(
                f"another sae-study is running in {out}: wait until it ends, stop it, or choose another --out"
            )
        yield is_locked


def _carry_out(recipes: Sequence[Recipe], course: Course, console: Console) -> list[Line]:
    for recipe in recipes:
        train(training_words(recipe, course, course.options, course.baselines), console)
    folders = {recipe.name: RunFolder(course.out / recipe.name) for recipe in recipes}
    finished = [recipe for recipe in recipes if folders[recipe.name].is_finished]
    for recipe in finished:
        if recipe.name == DECISIVE:
            train(half_command(recipe, course), console)
    place = ["--runs", str(course.out), *(["--cache", course.cache] if id_of_store(course.cache) else [])]
    for eval_ids in dict.fromkeys(recipe.evals for recipe in finished if recipe.evals):
        runs = [recipe.name for recipe in finished if recipe.evals == eval_ids]
        words = [*runs, *place, "--evals", ",".join(eval_ids), "--resume"]
        words += [word for setting in settings_of(course.evaluation, eval_ids) for word in ("--set", setting)]
        call(sae_eval, "sae-eval", words, console, allowed=(0, 1, 3))  # the table names each failure
    every = [*recipes, *earlier_runs(recipes, course.out)]
    all_evals = list(dict.fromkeys(eval_id for recipe in every for eval_id in recipe.evals))
    configs = make_configs(",".join(all_evals), settings_of(course.evaluation, all_evals)) if all_evals else {}
    all_results = [(one, _lines_of(one, course.out, configs, is_asked=one in recipes)) for one in every]
    write_tables(all_results, course.out, console)
    results = all_results[: len(recipes)]
    draw_pictures(results, folders, course.out / "plots", console)
    return [line for _, lines in results for line in lines]


def _lines_of(recipe: Recipe, out: Path, configs: Mapping[str, Any], *, is_asked: bool) -> list[Line]:
    """The lines of a run; an earlier one that cannot be read does not cost the others their table."""
    folder = RunFolder(out / recipe.name)
    try:
        if not folder.is_finished:  # any other failure would have stopped the study
            return [Line(recipe.name, label, {}, [DIVERGED]) for label in folder.read_config()["saes"]]
        return read_lines(folder, recipe.evals, recipe.costs, configs)
    except (EvalError, TrainError) as error:
        if is_asked:
            raise
        return [Line(recipe.name, recipe.saes[0].label, {}, [str(error)])]


def earlier_runs(recipes: Sequence[Recipe], out: Path) -> Iterator[Recipe]:
    """The study's other finished runs in this folder, each with those of its evaluations that have results."""
    named = [recipe.name for recipe in recipes]
    for recipe in runs_of(recipes[0].study):
        folder = RunFolder(out / recipe.name)
        if recipe.name not in named and folder.is_finished:
            measured = (name for name in recipe.evals if any((folder.path / "evals" / name).glob(f"*{RESULTS}")))
            yield replace(recipe, evals=tuple(measured))


def settings_of(settings: Sequence[str], eval_ids: Sequence[str]) -> list[str]:
    """The settings of these evaluations: sae-eval refuses those of any other."""
    return [setting for setting in settings if setting.split(".")[0] in eval_ids]


def draw_pictures(results: Results, folders: Mapping[str, RunFolder], out: Path, console: Console) -> None:
    """Draw plots of the runs with several seeds, next to the table."""
    from .seed_plots import draw_bands  # late: --help must not wait for matplotlib

    for recipe, lines in results:
        if recipe.seeds > 1 and any(line.values for line in lines):
            curves: dict[str, list[list[tuple[float, float]]]] = {}
            points = curve_by_label(folders[recipe.name])
            for line in (line for line in lines if line.values):  # without those that diverged
                curves.setdefault(line.family, []).append(points.get(line.label, []))
            title, titles = f"{recipe.study}: {recipe.name}", titles_of(recipe.evals)
            named = [replace(one, values={titles.get(n, n): v for n, v in one.values.items()}) for one in lines]
            more_is_better = [titles.get(name, name) for name in MEASURES]
            written = draw_bands(recipe.name, title, families(named), recipe.against[0], curves, out, more_is_better)
            console.print(f"plots: {', '.join(str(path) for path in written)}", markup=False, soft_wrap=True)


def keep_course(course: Course, is_locked: bool = True) -> None:
    """Refuse settings or a store that differ from an earlier call's, as all runs of a table share them. Until a run has
    started, the latest settings hold; without a lock, when another process may be about to start one, the first."""
    wanted = {"options": list(course.options), "seeds": course.seeds, "baselines": course.baselines}
    path = course.out / "course.json"
    started = sorted(course.out.glob("*/config.json"))
    if started:
        require_one_store(course, started)
    if is_locked and not (started and path.is_file()):
        write_json(path, wanted)
        return
    with suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
        json.dump(wanted, file)
    if (found := read_json(path)) != wanted:
        raise click.ClickException(
            f"{course.out} was started with {_as_options(found)}, found {_as_options(wanted)}: "
            "give the same options, or choose another --out"
        )


def _as_options(course: Mapping[str, Any]) -> str:
    words = list(course.get("options") or ())
    words += ["--seeds", str(course["seeds"])] if course.get("seeds") is not None else []
    words += ["--with-baselines"] if course.get("baselines") else []
    return shlex.join(words) or "no options"


def require_one_store(course: Course, started: Sequence[Path]) -> None:
    """Refuse a store that earlier runs were not trained on: their numbers would share a table."""
    ids = {path: cache_of(RunFolder(path.parent))[1] for path in started}
    # If it is gone, existing results can still be reported.
    found = id_of_store(course.cache) or next(iter(ids.values()))
    for path, trained_on in ids.items():
        if trained_on != found:
            raise click.ClickException(
                f"{path.parent} was trained on store {trained_on}, but {course.cache} is store {found}: give --cache "
                "the store that the study was started with, or choose another --out"
            )


def half_command(recipe: Recipe, course: Course) -> list[str]:
    """The words after `sae-train` for the base of a finished run at half its length; none if that has finished."""
    tokens = RunFolder(course.out / recipe.name).read_config()["course"]["tokens"] // 2
    pairs = zip(course.options[::2], course.options[1::2], strict=True)
    options = [word for pair in pairs if not _sets_length(*pair) for word in pair]
    return training_words(half_of(recipe), course, [*options, "--tokens", str(tokens), *AS_OFTEN], False)


def _sets_length(option: str, value: str) -> bool:
    name = value.partition("=")[0].strip() if option == "--set" else option
    return name in ("--tokens", "--epochs", "course.tokens", "course.epochs")


def training_words(recipe: Recipe, course: Course, options: Sequence[str], baselines: bool) -> list[str]:
    """The words after `sae-train` for a run; none if it has finished."""
    name = recipe.name
    folder = RunFolder(course.out / name)
    if folder.is_finished:
        return []
    if (folder.path / "config.json").is_file():
        return ["--resume", name, "--out", str(course.out), "--cache", course.cache]
    count = recipe.seeds if recipe.seeds == 1 or course.seeds is None else course.seeds
    seeds = ["--grid", "seed=" + ",".join(map(str, range(count)))] if recipe.seeds > 1 else []
    place = ["--cache", course.cache, "--out", str(course.out), "--name", name]
    beside = ["--with-baselines"] if baselines and recipe.seeds > 1 else []
    return ["--recipe", f"{recipe.study}/{name}", *place, *options, *seeds, *beside]


def train(words: Sequence[str], console: Console) -> None:
    """Train a run, unless it has finished."""
    if words:
        call(sae_train, "sae-train", words, console)


def call(command: Any, name: str, words: Sequence[str], console: Console, allowed: Sequence[int] = (0,)) -> None:
    """Run a command of this package, and print it as one would type it. A failure stops the study, except diverged
    training, which the table reports; a signal that stops the command stops the study with the same exit status."""
    console.print(f"$ {shlex.join([name, *words])}", style="bold", markup=False)
    try:
        command.main(list(words), prog_name=name, standalone_mode=False)
    except SystemExit as end:
        status = end.code or 0
        if isinstance(status, int) and status > 128:
            raise
        if status not in allowed and not isinstance(end.__cause__, (NonFiniteLoss, TrainingDiverged)):
            raise click.ClickException(f"{name} exited with status {status}: its last lines say why") from None


if __name__ == "__main__":
    main()
