"""`sae-study`: a study from its recipes to its table.

1. Every run of the study, by the commands a person would type; runs that ended are kept, others continue.
2. Runs that compare, such as `headline`, once for each of several seeds: comparisons need more than one.
3. For the run that decides, its base once more at half the length: `growth` in the table says if the budget counts.
4. Evaluation: core, the study's own measures, and what else a run asks for.
5. table.md and table.json of all runs of the study that have ended, with the differences of SAEs from their base and
   controls, their intervals, and a correction for how many there are; a list of all problems, and a non-zero exit
   if there are any: a run without steps, NaN, scores that take no learning.

The run `decisive`, five seeds at equal sparsity, is longer than all others together: `--only decisive` asks for it.
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
from ..evaluate.run.command import errors_told, id_of_store, make_configs
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
    "training diverged, and no SAE of the run has a result. The same call trains it again, to the same end: choose a "
    "lower learning rate (--set optim.lr=) and another --out"
)


@dataclass(frozen=True)
class Course:
    """What all runs of a study share."""

    cache: str
    out: Path
    options: tuple[str, ...]
    """Options of sae-train, such as --tokens 1M."""
    seeds: int | None
    """Seeds of runs that compare; None: as many as the recipe says."""
    baselines: bool = False
    """Whether sanity baselines train along with the SAEs of runs that compare."""
    evaluation: tuple[str, ...] = ()
    """Options of sae-eval, such as --set sparse_probing.data=stdlib. Training does not depend on them: another call may
    give others."""


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
@click.option("--width", metavar="F", help="Latents.  [default: the recipe's, at most 16 times the residual width]")
@click.option("--only", "wanted", metavar="RUN,RUN", help="Only these runs of the study.  [default: all but decisive]")
@click.option(
    "--seeds", type=click.IntRange(1), help="How many seeds runs that compare have.  [default: the recipe's, 3 or 5]"
)
@click.option(
    "--with-baselines", "baselines", is_flag=True, help="Train sanity baselines along with the SAEs that are compared."
)
@click.option("--evals", "few", metavar="NAMES", help="Only these evaluations of each run.  [default: all]")
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
    wanted: str | None,
    seeds: int | None,
    baselines: bool,
    few: str | None,
    settings: tuple[str, ...],
    evaluation: tuple[str, ...],
    is_json: bool,
) -> None:
    """Train, evaluate and compare all runs of STUDY, or of every study."""
    with errors_told(refuse):
        if count_processes() > 1:
            refuse(
                "expected one process, found several, as torchrun starts them: start a study without torchrun, and use "
                "torchrun with sae-train --recipe STUDY/RUN for what is too large for one process"
            )
    given = {"--tokens": tokens, "--epochs": epochs, "--width": width}
    options = [word for name, value in given.items() if value is not None for word in (name, value)]
    options += [word for setting in settings for word in ("--set", setting)]
    words = tuple(word for setting in evaluation for word in ("--set", setting))
    with errors_told(lambda message: refuse(f"--eval-set: {message.removeprefix('error: ')}")):
        make_configs(evals.ALL, evaluation)  # refuses what no evaluation has, before anything is trained
    told = []
    try:
        with errors_told(refuse), redirect_stdout(sys.stderr) if is_json else nullcontext():  # for what it runs, too
            chosen = {study: restrict(choose(study, wanted), few) for study in names or studies()}
            for line in unused(list(chain.from_iterable(chosen.values())), few, evaluation, seeds, baselines):
                click.echo(line, err=True)
            for study, recipes in chosen.items():
                course = Course(cache, out / study, tuple(options), seeds, baselines, words)
                with name_full_disk(f"writing into {course.out}"):
                    told.append((course, carry_out(recipes, course, make_console())))
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    problems = [
        f"{of.out.name}/{line.run}/{line.label}: {p}" for of, lines in told for line in lines for p in line.problems
    ]
    if is_json:
        found = [{"folder": str(course.out), "saes": rows_of(lines)} for course, lines in told]
        print_json({"studies": found, "problems": problems})
    for problem in problems:
        click.echo(f"failed: {problem}", err=True)
    sys.exit(1 if problems else 0)


def refuse(message: str) -> None:
    raise click.ClickException(message.removeprefix("error: "))


def choose(study: str, wanted: str | None) -> list[Recipe]:
    """The runs of a study except the one that decides, or those that are named."""
    if wanted is None:
        return [recipe for recipe in runs_of(study) if recipe.name != DECISIVE]
    named = [name for name in dict.fromkeys(name.strip() for name in wanted.split(",")) if name]
    if not named:
        raise click.ClickException(
            f"--only {wanted!r}: expected names of runs, found none: give one of "
            f"{', '.join(recipe.name for recipe in runs_of(study))}, or leave it out"
        )
    for name in named:
        if name.endswith(HALF):
            whole = name.removesuffix(HALF)
            raise click.ClickException(
                f"--only {name}: expected a run with something to compare, found the base of {whole} alone. Ask for "
                f"{whole}, with which it is trained, or train it by itself: sae-train --recipe {study}/{name}"
            )
    return [recipe for name in named for recipe in find_recipes(f"{study}/{name}")]


def restrict(recipes: Sequence[Recipe], few: str | None) -> list[Recipe]:
    """The runs with those of their evaluations that are named; None: with all."""
    if few is None:
        return list(recipes)
    named = [name.strip() for name in few.split(",")]
    for name in named:
        evals.load(name)  # the error for an unknown one suggests what was meant
    found = [replace(recipe, evals=tuple(name for name in recipe.evals if name in named)) for recipe in recipes]
    if not any(recipe.evals for recipe in found):
        known = sorted({name for recipe in recipes for name in recipe.evals})
        raise click.ClickException(
            f"--evals {few}: no run of {recipes[0].study} that was asked for has it, but {', '.join(known)}; "
            "`sae-eval RUN --evals NAME` adds others afterwards"
        )
    return found


def unused(
    recipes: Sequence[Recipe], few: str | None, evaluation: Sequence[str], seeds: int | None, baselines: bool
) -> Iterator[str]:
    """What was requested but none of these runs uses."""
    measured = {eval_id for recipe in recipes for eval_id in recipe.evals}
    named = [name.strip() for name in few.split(",")] if few else []
    yield from (f"--evals {name}: none of these runs has it" for name in named if name not in measured)
    for said in evaluation:
        if (eval_id := said.partition(".")[0]) not in measured:
            yield f"--eval-set {said}: none of these runs is measured by {eval_id}"
    options = {"--seeds": seeds is not None, "--with-baselines": baselines}
    if not any(recipe.seeds > 1 for recipe in recipes):
        yield from (f"{name}: none of these runs compares seeds" for name, is_said in options.items() if is_said)


def carry_out(recipes: Sequence[Recipe], course: Course, console: Console) -> list[Line]:
    """Carry out one study; what is done already is kept."""
    with _alone(course.out) as is_alone:
        keep_course(course, is_alone)
        return _carry_out(recipes, course, console)


@contextmanager
def _alone(out: Path) -> Iterator[bool]:
    """Let one process at a time carry out a study in this folder: the runs of two would go into one table. Yields
    whether the disk has locks to ensure it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open("ab")
    except OSError as error:
        raise click.ClickException(f"{out} cannot be made ({error.strerror}): choose another --out") from None
    with file:
        is_alone = take_lock(file)
        if is_alone is None:
            raise click.ClickException(
                f"another sae-study is at work in {out}: wait until it ends, stop it, or choose another --out"
            )
        yield is_alone


def _carry_out(recipes: Sequence[Recipe], course: Course, console: Console) -> list[Line]:
    for recipe in recipes:
        train(training_words(recipe, course, course.options, course.baselines), console)
    folders = {recipe.name: RunFolder(course.out / recipe.name) for recipe in recipes}
    ended = [recipe for recipe in recipes if folders[recipe.name].is_finished]
    for recipe in ended:
        if recipe.name == DECISIVE:
            train(half_command(recipe, course), console)
    place = ["--runs", str(course.out), *(["--cache", course.cache] if id_of_store(course.cache) else [])]
    for eval_ids in dict.fromkeys(recipe.evals for recipe in ended if recipe.evals):
        runs = [recipe.name for recipe in ended if recipe.evals == eval_ids]
        words = [*runs, *place, "--evals", ",".join(eval_ids), "--resume"]
        words += settings_of(course.evaluation, eval_ids)
        call(sae_eval, "sae-eval", words, console, may_end=(0, 1, 3))  # the table says line by line what failed
    every = [*recipes, *of_before(recipes, course.out)]
    all_evals = list(dict.fromkeys(eval_id for recipe in every for eval_id in recipe.evals))
    asked = make_configs(",".join(all_evals), settings_of(course.evaluation, all_evals)[1::2]) if all_evals else {}
    read = [(one, _lines_of(one, course.out, asked, is_asked=one in recipes)) for one in every]
    write_tables(read, course.out, console)
    results = read[: len(recipes)]
    draw_pictures(results, folders, course.out / "plots", console)
    return [line for _, lines in results for line in lines]


def _lines_of(recipe: Recipe, out: Path, asked: Mapping[str, Any], *, is_asked: bool) -> list[Line]:
    """The lines of a run; an earlier one that cannot be read does not cost the others their table."""
    folder = RunFolder(out / recipe.name)
    try:
        if not folder.is_finished:  # any other failure of a run has ended the study
            return [Line(recipe.name, label, {}, [DIVERGED]) for label in folder.read_config()["saes"]]
        return read_lines(folder, recipe.evals, recipe.costs, asked)
    except (EvalError, TrainError) as error:
        if is_asked:
            raise
        return [Line(recipe.name, recipe.saes[0].label, {}, [str(error)])]


def of_before(recipes: Sequence[Recipe], out: Path) -> Iterator[Recipe]:
    """The other runs of the study that have ended here, with those of their evaluations that have results."""
    named = [recipe.name for recipe in recipes]
    for recipe in runs_of(recipes[0].study):
        folder = RunFolder(out / recipe.name)
        if recipe.name not in named and folder.is_finished:
            has = (eval_id for eval_id in recipe.evals if any((folder.path / "evals" / eval_id).glob(f"*{RESULTS}")))
            yield replace(recipe, evals=tuple(has))


def settings_of(words: Sequence[str], eval_ids: Sequence[str]) -> list[str]:
    """The settings of these evaluations among those of all; sae-eval takes none of another."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for option, said in pairs if said.split(".")[0] in eval_ids for word in (option, said)]


def draw_pictures(results: Results, folders: Mapping[str, RunFolder], out: Path, console: Console) -> None:
    """Draw the runs of several seeds, next to the table."""
    from .seed_plots import draw_bands  # late: --help must not wait for matplotlib

    for recipe, lines in results:
        if recipe.seeds > 1 and any(line.values for line in lines):
            curves: dict[str, list[list[tuple[float, float]]]] = {}
            points = curve_by_label(folders[recipe.name])
            for line in (line for line in lines if line.values):  # there is nothing to draw for one that diverged
                curves.setdefault(line.family, []).append(points.get(line.label, []))
            title, titles = f"{recipe.study}: {recipe.name}", titles_of(recipe.evals)
            named = [replace(one, values={titles.get(n, n): v for n, v in one.values.items()}) for one in lines]
            more = [titles.get(name, name) for name in MEASURES]
            written = draw_bands(recipe.name, title, families(named), recipe.against[0], curves, out, more)
            console.print(f"plots: {', '.join(str(path) for path in written)}", markup=False, soft_wrap=True)


def keep_course(course: Course, is_alone: bool = True) -> None:
    """Runs of one table share their settings and their store: a call with others than an earlier one is refused, once
    that has begun a run; where another may be at work and about to begin one, whatever it has begun."""
    wanted = {"options": list(course.options), "seeds": course.seeds, "baselines": course.baselines}
    path = course.out / "course.json"
    begun = sorted(course.out.glob("*/config.json"))
    if begun:
        require_one_store(course, begun)
    if is_alone and not (begun and path.is_file()):
        write_json(path, wanted)
        return
    with suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
        json.dump(wanted, file)
    if (found := read_json(path)) != wanted:
        raise click.ClickException(
            f"{course.out} was begun with {_typed(found)}, found {_typed(wanted)}: "
            "give the same options, or choose another --out"
        )


def _typed(course: Mapping[str, Any]) -> str:
    """A course as command-line options."""
    words = list(course.get("options") or ())
    words += ["--seeds", str(course["seeds"])] if course.get("seeds") is not None else []
    words += ["--with-baselines"] if course.get("baselines") else []
    return shlex.join(words) or "no options"


def require_one_store(course: Course, begun: Sequence[Path]) -> None:
    """Refuse another store at the same place: runs on other text would go into the same table."""
    trained = {path: cache_of(RunFolder(path.parent))[1] for path in begun}
    # If it is gone, existing results can still be reported.
    found = id_of_store(course.cache) or next(iter(trained.values()))
    for path, trained_on in trained.items():
        if trained_on != found:
            raise click.ClickException(
                f"{path.parent} was trained on store {trained_on}, but {course.cache} is store {found}: give --cache "
                "the store that the study was begun with, or choose another --out"
            )


def half_command(recipe: Recipe, course: Course) -> list[str]:
    """The words after `sae-train` for the base of a finished run, at half its length; none if that has ended."""
    tokens = RunFolder(course.out / recipe.name).read_config()["course"]["tokens"] // 2
    pairs = zip(course.options[::2], course.options[1::2], strict=True)
    options = [word for pair in pairs if not _says_length(*pair) for word in pair]
    return training_words(half_of(recipe), course, [*options, "--tokens", str(tokens), *AS_OFTEN], False)


def _says_length(option: str, value: str) -> bool:
    name = value.partition("=")[0].strip() if option == "--set" else option
    return name in ("--tokens", "--epochs", "course.tokens", "course.epochs")


def training_words(recipe: Recipe, course: Course, options: Sequence[str], beside: bool) -> list[str]:
    """The words after `sae-train` for a run; none if it has ended."""
    name = recipe.name
    folder = RunFolder(course.out / name)
    if folder.is_finished:
        return []
    if (folder.path / "config.json").is_file():
        return ["--resume", name, "--out", str(course.out), "--cache", course.cache]
    count = recipe.seeds if recipe.seeds == 1 or course.seeds is None else course.seeds
    seeds = ["--grid", "seed=" + ",".join(map(str, range(count)))] if recipe.seeds > 1 else []
    place = ["--cache", course.cache, "--out", str(course.out), "--name", name]
    baselines = ["--with-baselines"] if beside and recipe.seeds > 1 else []
    return ["--recipe", f"{recipe.study}/{name}", *place, *options, *seeds, *baselines]


def train(words: Sequence[str], console: Console) -> None:
    """Train a run, unless it has ended."""
    if words:
        call(sae_train, "sae-train", words, console)


def call(command: Any, name: str, words: Sequence[str], console: Console, may_end: Sequence[int] = (0,)) -> None:
    """Run a command of this package and print it as one would type it. A failure ends the study, except training that
    diverged, which the table reports; a stop ends the study as it ended the command."""
    console.print(f"$ {shlex.join([name, *words])}", style="bold", markup=False)
    try:
        command.main(list(words), prog_name=name, standalone_mode=False)
    except SystemExit as end:
        status = end.code or 0
        if isinstance(status, int) and status > 128:
            raise
        if status not in may_end and not isinstance(end.__cause__, (NonFiniteLoss, TrainingDiverged)):
            raise click.ClickException(f"{name} ended with status {status}: its last lines say why") from None


if __name__ == "__main__":
    main()
