"""`sae-study`: a study from its recipes to its table.

1. Every run of the study, by the commands a person would type; runs that ended are kept, others go on.
2. Runs that compare, such as `headline`, once for each of several seeds: comparisons stand on more than one.
3. Of the run that decides, its base once more at half the length: `growth` in the table, whether the budget counts.
4. Evaluation: core, the study's own measures, and what else a run asks for.
5. table.md and table.json, with the differences of SAEs from their base and controls, their intervals, and a
   correction for how many there are; a list of everything wrong, and a non-zero exit if there is anything: a run
   without steps, NaN, scores no better than those of an SAE that was never trained.

The run `decisive`, five seeds at equal sparsity, is longer than all others together: `--only decisive` asks for it.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.table import Table

from ..cache_schema.cli import as_json, print_json
from ..cache_schema.strict_json import flatten
from ..evaluate import evals
from ..evaluate.cli import main as sae_eval
from ..evaluate.context.results import metric_of, read_result, settings_in, without_nan
from ..evaluate.output.figures.records import RESULTS, read_log
from ..evaluate.run.command import errors_told, make_configs
from ..evaluate.run.console_table import heading, make_console, untrained_traits
from ..train.cli import main as sae_train
from ..train.command import beginning_with
from ..train.config.recipe import HALF, Recipe, half_of
from ..train.disk.whole_files import read_json, replace_file, write_json
from ..train.recipes import find_recipes, runs_of, studies
from ..train.run.folder import RunFolder
from .comparisons import Difference, compare
from .decision_rule import Families, is_baseline, judge

CORE, DECISIVE = "core", "decisive"
LOGGED = "explained_variance"
AS_OFTEN = ("--epochs", "1000")
"""As it takes for the tokens that are asked for."""
MEASURES = (
    "explained_variance",
    "ce_loss_score",
    "kl_div_score",
    "frac_alive",
    "sae_top_1_test_accuracy",
    "sae_top_5_test_accuracy",
    "scr_metric_threshold_10",
    "scr_metric_threshold_50",
    "tpp_threshold_10_total_metric",
    "tpp_threshold_50_total_metric",
)
"""What SAEs are compared at (`docs/studies/questions.md`). Not what another seed finds again: each number of it is
about pairs of seeds, so that five of them are not five."""
ASKS_FOR_MATERIAL = ("unlearning",)
"""WMDP's text is given on request only, and is about one model: a study is whole without."""
SEED = re.compile(r"_seed(\d+)(?=$|_frozen_)")


@dataclass(frozen=True)
class Course:
    """What all runs of a study share."""

    cache: str
    out: Path
    options: tuple[str, ...]
    """Of sae-train, such as --tokens 1M."""
    seeds: int | None
    """Of runs that compare; None: as many as the recipe says."""
    baselines: bool = False
    """Whether sanity baselines train beside the SAEs of runs that compare."""
    evaluation: tuple[str, ...] = ()
    """Of sae-eval, such as --set sparse_probing.data=stdlib. Not of the training: another call may say others."""


@dataclass(frozen=True)
class Line:
    """One SAE of a study."""

    run: str
    label: str
    values: dict[str, float | None]
    """None for what was measured and gave no number."""
    problems: list[str]
    remarks: list[str] = field(default_factory=list)
    """Why numbers are not there, where an evaluation says."""

    @property
    def family(self) -> str:
        """The label without its seed."""
        return SEED.sub("", self.label)

    @property
    def seed(self) -> int:
        found = SEED.search(self.label)
        return int(found[1]) if found else 0


Results = Sequence[tuple[Recipe, Sequence[Line]]]


EXAMPLES = """\b
Examples:
  sae-study attention --cache ./store
  sae-study --cache ./store --tokens 1M --width 512 --seeds 2
  sae-study tiered --cache ./store --json | jq '.studies[].saes'
"""


def complete_studies(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return beginning_with(incomplete, studies())


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("names", nargs=-1, metavar="[STUDY]...", shell_complete=complete_studies)
@click.option("--cache", required=True, metavar="URL", help="The store, with attention of layers L-2..L+1.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("study_runs"), show_default=True, metavar="DIR")
@click.option("--tokens", metavar="N", help="Tokens for each run, such as 1M.  [default: the recipe's]")
@click.option("--epochs", metavar="N", help="How often the store may be read.")
@click.option("--width", metavar="F", help="Latents.  [default: the recipe's, at most 16 times the residual width]")
@click.option("--only", "wanted", metavar="RUN,RUN", help="Only these runs of the study.  [default: all but decisive]")
@click.option("--seeds", type=click.IntRange(1), help="Of runs that compare.  [default: the recipe's, 3 or 5]")
@click.option("--with-baselines", "baselines", is_flag=True, help="Sanity baselines beside the SAEs that are compared.")
@click.option("--evals", "few", metavar="NAMES", help="Only these of a run's evaluations.  [default: all]")
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
    given = {"--tokens": tokens, "--epochs": epochs, "--width": width}
    options = [word for name, value in given.items() if value is not None for word in (name, value)]
    options += [word for setting in settings for word in ("--set", setting)]
    words = tuple(word for setting in evaluation for word in ("--set", setting))
    require_settings(evaluation)
    told = []
    with errors_told(refuse), redirect_stdout(sys.stderr) if is_json else nullcontext():  # of what it runs, too
        chosen = {study: restrict(choose(study, wanted), few) for study in names or studies()}
        for study, recipes in chosen.items():
            course = Course(cache, out / study, tuple(options), seeds, baselines, words)
            told.append((course, carry_out(recipes, course, make_console())))
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
    """The runs of a study but the one that decides, or those that are named."""
    if wanted is None:
        return [recipe for recipe in runs_of(study) if recipe.name != DECISIVE]
    named = [name.strip() for name in wanted.split(",")]
    for name in named:
        if name.endswith(HALF):
            whole = name.removesuffix(HALF)
            raise click.ClickException(
                f"--only {name}: expected a run with something to compare, found the base of {whole} alone. Ask for "
                f"{whole}, beside which it is trained, or for itself: sae-train --recipe {study}/{name}"
            )
    return [recipe for name in named for recipe in find_recipes(f"{study}/{name}")]


def restrict(recipes: Sequence[Recipe], few: str | None) -> list[Recipe]:
    """The runs with those of their evaluations that are named; None: with all."""
    if few is None:
        return list(recipes)
    named = [name.strip() for name in few.split(",")]
    for name in named:
        evals.load(name)  # an unknown one is told with what it may have meant
    found = [replace(recipe, evals=tuple(name for name in recipe.evals if name in named)) for recipe in recipes]
    if not any(recipe.evals for recipe in found):
        known = sorted({name for recipe in recipes for name in recipe.evals})
        raise click.ClickException(
            f"--evals {few}: no run of {recipes[0].study} that was asked for has it, but {', '.join(known)}; "
            "`sae-eval RUN --evals NAME` adds others afterwards"
        )
    return found


def carry_out(recipes: Sequence[Recipe], course: Course, console: Console) -> list[Line]:
    """All of one study; what is done already is kept."""
    keep_course(course)
    for words in training_commands(recipes, course):
        call(sae_train, "sae-train", words, console)
    for recipe in recipes:
        if recipe.name == DECISIVE and (words := half_command(recipe, course)):
            call(sae_train, "sae-train", words, console)
    for eval_ids in dict.fromkeys(recipe.evals for recipe in recipes if recipe.evals):
        runs = [recipe.name for recipe in recipes if recipe.evals == eval_ids]
        words = [*runs, "--runs", str(course.out), "--evals", ",".join(eval_ids), "--resume"]
        words += settings_of(course.evaluation, eval_ids)
        call(sae_eval, "sae-eval", words, console, may_end=(0, 1, 3))  # the table says line by line what failed
    folders = {recipe.name: RunFolder.at(course.out / recipe.name) for recipe in recipes}
    results = [(recipe, read_lines(folders[recipe.name], recipe.evals, recipe.costs)) for recipe in recipes]
    write_tables(results, course.out, console)
    draw_pictures(results, folders, course.out / "plots", console)
    return [line for _, lines in results for line in lines]


def require_settings(evaluation: Sequence[str]) -> None:
    """Refuse what no evaluation has, before anything is trained."""
    with errors_told(lambda message: refuse(f"--eval-set: {message.removeprefix('error: ')}")):
        make_configs(evals.ALL, evaluation)


def settings_of(words: Sequence[str], eval_ids: Sequence[str]) -> list[str]:
    """The settings of these evaluations among those of all; sae-eval takes none of another."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for option, said in pairs if said.split(".")[0] in eval_ids for word in (option, said)]


def draw_pictures(results: Results, folders: Mapping[str, RunFolder], out: Path, console: Console) -> None:
    """Of the runs of several seeds, beside the table."""
    from .seed_plots import draw_bands  # loads matplotlib, which nobody waits for who asks for help

    for recipe, lines in results:
        if recipe.seeds > 1 and lines:
            curves: dict[str, list[list[tuple[float, float]]]] = {}
            points = curve_by_label(folders[recipe.name])
            for line in lines:
                curves.setdefault(line.family, []).append(points.get(line.label, []))
            title = f"{recipe.study}: {recipe.name}"
            written = draw_bands(recipe.name, title, families(lines), recipe.against[0], curves, out)
            console.print(f"plots: {', '.join(str(path) for path in written)}", markup=False, soft_wrap=True)


def keep_course(course: Course) -> None:
    """Runs of one table share their settings: those of an earlier call are refused if they differ."""
    wanted = {"cache": course.cache, "options": list(course.options), "seeds": course.seeds}
    wanted |= {"baselines": course.baselines}
    path = course.out / "course.json"
    if path.is_file():
        found = {"baselines": False, **read_json(path)}
        found.pop("evaluation", None)  # kept until 2026-11: what another call may say otherwise
        if found.get("seeds") == 3 and course.seeds is None:  # what was written where nothing was said
            found["seeds"] = None
        if found != wanted:
            raise click.ClickException(
                f"{course.out} was begun with {json.dumps(found)}, found {json.dumps(wanted)}: "
                "say the same again, or choose another --out"
            )
        return
    try:
        course.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"{course.out} cannot be made ({error.strerror}): choose another --out") from None
    write_json(path, wanted)


def training_commands(recipes: Iterable[Recipe], course: Course) -> list[list[str]]:
    """The words after `sae-train` for each run that has not ended."""
    words = [_training_words(recipe, course, course.options, course.baselines) for recipe in recipes]
    return [one for one in words if one]


def half_command(recipe: Recipe, course: Course) -> list[str]:
    """The same for the base of a finished run, at half its length; none where that has ended."""
    tokens = read_json(course.out / recipe.name / "result.json")["tokens"] // 2
    pairs = zip(course.options[::2], course.options[1::2], strict=True)
    options = [word for pair in pairs if pair[0] not in ("--tokens", "--epochs") for word in pair]
    return _training_words(half_of(recipe), course, [*options, "--tokens", str(tokens), *AS_OFTEN], False)


def _training_words(recipe: Recipe, course: Course, options: Sequence[str], beside: bool) -> list[str]:
    name = recipe.name
    folder = RunFolder.at(course.out / name)
    if folder.is_finished:
        return []
    if (folder.path / "config.json").is_file():
        return ["--resume", name, "--out", str(course.out)]
    count = recipe.seeds if recipe.seeds == 1 or course.seeds is None else course.seeds
    seeds = ["--grid", "seed=" + ",".join(map(str, range(count)))] if recipe.seeds > 1 else []
    place = ["--cache", course.cache, "--out", str(course.out), "--name", name]
    baselines = ["--with-baselines"] if beside and recipe.seeds > 1 else []
    return ["--recipe", f"{recipe.study}/{name}", *place, *options, *seeds, *baselines]


def call(command: Any, name: str, words: Sequence[str], console: Console, may_end: Sequence[int] = (0,)) -> None:
    """Run a command of this package and print it as one would type it; a failure ends the study."""
    console.print(f"$ {shlex.join([name, *words])}", style="bold", markup=False)
    try:
        command.main(list(words), prog_name=name, standalone_mode=False)
    except SystemExit as end:
        if (end.code or 0) not in may_end:
            raise click.ClickException(f"{name} ended with status {end.code}: its last lines say why") from None


def read_lines(folder: RunFolder, eval_ids: Sequence[str], costs: bool = False) -> list[Line]:
    """What a finished run came to: of its result and of its evaluations."""
    result = read_json(folder.path / "result.json")
    half = RunFolder.at(folder.path.with_name(folder.name + HALF))
    at_half = read_json(half.path / "result.json")["saes"] if half.is_finished else {}
    lines = []
    documents = {
        eval_id: {
            label: read_result(path)
            for label in result["saes"]
            if (path := folder.path / "evals" / eval_id / (label + RESULTS)).is_file()
        }
        for eval_id in eval_ids
    }
    uneven = {eval_id: differing(list(found.values())) for eval_id, found in documents.items()}
    for label, sae in result["saes"].items():
        values: dict[str, float | None] = {"steps": result["steps"], "dead": sae["dead_share"]}
        if label in at_half:
            values["growth"] = sae["explained_variance"] - at_half[label]["explained_variance"]
        if costs:
            seconds, size = sae.get("step_seconds"), sae.get("state_bytes")
            values["ms_per_step"] = None if seconds is None else 1e3 * seconds
            values["state_mb"] = None if size is None else size / 1e6
        remarks = [f"a warm-up or onset of {asked} steps took {given}" for asked, given in sae.get("cut_short", ())]
        problems = [] if result["steps"] > 0 else ["it made no step"]
        for eval_id in eval_ids:
            document = documents[eval_id].get(label)
            if document is None:
                (remarks if eval_id in ASKS_FOR_MATERIAL else problems).append(f"{eval_id} gave no result")
                continue
            if uneven[eval_id]:
                problems.append(f"{eval_id} is left out: results of this run differ in {uneven[eval_id]}")
                continue
            found = {metric: metric_of(document, metric) for metric in evals.load(eval_id).summary}
            values |= {metric.rsplit(".", 1)[-1]: value for metric, value in found.items()}
            problems += untrained_traits(document)
            remarks += absences(eval_id, document, found)
            if eval_id == CORE:
                remarks += measured_on(document, result)
                problems += [f"{metric.rsplit('.', 1)[-1]} is not a number" for metric, v in found.items() if v is None]
        problems += [f"{name} is not a number" for name, value in values.items() if not math.isfinite(value or 0.0)]
        lines.append(Line(folder.name, label, values, problems, remarks))
    return lines


def differing(documents: Sequence[Mapping[str, Any]]) -> str:
    """The settings in which results of one evaluation differ: none of them can be told to be the one that was meant."""
    all_of = [flatten(settings_in(document)) for document in documents]
    keys = sorted({key for one in all_of for key in one})
    return ", ".join(key for key in keys if any(one.get(key) != all_of[0].get(key) for one in all_of))


def curve_by_label(folder: RunFolder) -> dict[str, list[tuple[float, float]]]:
    """Steps, and the explained variance of the batch, as the run logged them."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in read_log(folder.metrics):
        if isinstance(line.get(LOGGED), float):
            curves.setdefault(line["sae"], []).append((line["step"], line[LOGGED]))
    return curves


def absences(eval_id: str, document: Mapping[str, Any], found: Mapping[str, float | None]) -> list[str]:
    """The metrics of a result that are not there, and why as far as it says."""
    names = [metric.rsplit(".", 1)[-1] for metric, value in found.items() if value is None]
    ours = document.get("saemill", {})
    if not names and ours.get("missing"):
        return [f"{eval_id} is of a part of its data: {ours['missing']}"]
    reason = ours.get("missing") or ours.get("remark") or "its result does not say why"
    return [f"{eval_id} has no {', '.join(names)}: {reason}"] if names else []


def measured_on(document: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """The model and the store that a run's numbers are about, as far as its results say."""
    store, model = document.get("saemill", {}).get("cache_id"), document.get("sae_cfg_dict", {}).get("model_name")
    if store is None:
        return []
    return [f"of the model {model}, store id {store}: {result.get('tokens', 0):,} tokens in {result['steps']:,} steps"]


def write_tables(results: Results, out: Path, console: Console) -> None:
    """On the console, and as table.md and table.json."""
    every = [line for _, lines in results for line in lines]
    parts = []
    for title, head, rows in _tables(results):
        console.print(_table(title, head, rows))
        parts.append(f"**{title}**\n\n{_markdown(head, rows)}")
    remarks = [selected(recipe, lines) for recipe, lines in results if recipe.select] + remarks_of(every)
    for remark in remarks:
        console.print(remark, markup=False, soft_wrap=True)
    if remarks:
        parts.append("\n".join(f"- {remark}" for remark in remarks))
    replace_file(out / "table.md", "\n\n".join(parts).encode() + b"\n")
    replace_file(out / "table.json", json.dumps(rows_of(every), indent=1, allow_nan=False).encode() + b"\n")


def rows_of(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """For scripts: plain JSON values."""
    return without_nan([{"run": line.run, "label": line.label, **line.values} for line in lines], None)


def remarks_of(lines: Iterable[Line]) -> list[str]:
    """Each once, with whom it is about: the seeds of an SAE are one name, and all SAEs of a run are the run."""
    about: dict[tuple[str, str], list[str]] = {}
    everybody: dict[str, set[str]] = {}
    for line in lines:
        everybody.setdefault(line.run, set()).add(line.label)
        for remark in line.remarks:
            about.setdefault((line.run, remark), []).append(line.label)
    told = []
    for (run, remark), labels in about.items():
        names = ", ".join(dict.fromkeys(SEED.sub("", label) for label in labels))
        told.append(f"{run}: {remark}" if set(labels) == everybody[run] else f"{run}/{names}: {remark}")
    return told


def selected(recipe: Recipe, lines: Sequence[Line]) -> str:
    """Which SAE of a run is the best at what it is selected by; of one seed, so that it says where to look."""
    found = {line.label: value for line in lines if (value := line.values.get(recipe.select)) is not None}
    if not found:
        return f"{recipe.name}: nothing to select by, no SAE has {recipe.select}"
    order = sorted(found, key=lambda label: -found[label])
    ranking = ", ".join(f"{label} {found[label]:.4g}" for label in order)
    return f"{recipe.name}: selected by {recipe.select}: {order[0]} ({ranking})"


def _tables(results: Results) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Runs of one seed together; each run of several by itself, and then its differences."""
    alone = [line for recipe, lines in results if recipe.seeds == 1 for line in lines]
    if alone:
        columns = _columns(alone)
        cells = [[line.run, line.label, *(_cell(line.values.get(column)) for column in columns)] for line in alone]
        yield f"{results[0][0].study}: runs", ["run", "SAE", *columns], cells
    for recipe, lines in results:
        if recipe.seeds == 1 or not lines:
            continue
        columns = _columns(lines)
        title = f"{recipe.study}: {recipe.name}"
        seeds = len({line.seed for line in lines if not is_baseline(line.family)})
        yield f"{title}, mean ± standard deviation over seeds", ["SAE", "seeds", *columns], seeded_rows(lines, columns)
        rows = [
            [d.label, d.against, d.measure, interval_of(d, seeds), f"{d.p_corrected:.2g}", d.verdict]
            for d in differences(recipe, lines)
        ]
        if rows:
            head = ["SAE", "against", "measure", "difference, 95 %", "p, corrected", "found"]
            yield f"{title}, differences by seed, p corrected for all {len(rows)} (Holm)", head, rows
            found = judge(families(lines), recipe.against, differences(recipe, lines), MEASURES)
            cells = [[one.label, one.verdict, one.why] for one in found]
            yield f"{title}, by the rule of docs/studies/questions.md", ["SAE", "found", "why"], cells


def differences(recipe: Recipe, lines: Sequence[Line]) -> list[Difference]:
    """At what no SAE is trained on."""
    known = {name for line in lines for name in line.values}
    values = {label: seeds for label, seeds in families(lines).items() if not is_baseline(label)}
    return compare(values, recipe.against, [name for name in MEASURES if name in known])


def families(lines: Iterable[Line]) -> Families:
    """Values by SAE and seed."""
    values: dict[str, dict[int, dict[str, float | None]]] = {}
    for line in lines:
        values.setdefault(line.family, {})[line.seed] = line.values
    return values


def _columns(lines: Iterable[Line]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line.values))


def seeded_rows(lines: Sequence[Line], columns: Sequence[str]) -> list[list[str]]:
    """A row for each SAE that was trained from several seeds."""
    rows = []
    for family in dict.fromkeys(line.family for line in lines):
        members = [line for line in lines if line.family == family]
        found = [[v for line in members if (v := line.values.get(c)) is not None] for c in columns]
        cells = [spread(own) + (f" (of {len(own)})" if 0 < len(own) < len(members) else "") for own in found]
        rows.append([family, str(len(members)), *cells])
    return rows


def interval_of(difference: Difference, seeds: int) -> str:
    """The mean and half of its 95 % interval, and of how many seeds where it is not of all."""
    partly = f" (of {difference.seeds})" if difference.seeds < seeds else ""
    return f"{difference.mean:+.4g} ± {difference.half_width:.2g}{partly}"


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation where there are several."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{deviation}"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(head):
        table.add_column(heading(name), justify="left" if number < 2 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruler = ["---", "---", *("--:" for _ in head[2:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ruler, *rows))


if __name__ == "__main__":
    main()
