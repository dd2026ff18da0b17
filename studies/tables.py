"""A study's tables, on the console and as table.md and table.json: each SAE's numbers, and the differences by seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..evaluate.context.write_and_read_results import heading, without_nan
from ..evaluate.output.figures.records import SEED
from ..evaluate.run.console_table import Column, split_to_fit
from ..train.config.recipe import Recipe
from ..train.disk.atomic_files import replace_file
from .compare_and_decide import DECISIVE, Difference, Finding, compare, is_baseline, judge, methods_of, why_outside
from .run_results import Line, Results, families, titles_of

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
"""The measures that SAEs are compared at (`docs/studies/questions.md`). How much another seed finds again is not among
them: each of its numbers is about pairs of seeds, so those of five seeds are not independent."""


def write_tables(results: Results, out: Path, console: Console) -> None:
    """Print the tables, and write them to table.md and table.json."""
    every = [line for _, lines in results for line in lines]
    parts = []
    for title, head, rows in _tables(results):
        console.print(title, style="italic", markup=False)
        for table in _fitting(head, rows, console.width):
            console.print(table)
        ruler = ["---", "---", *("--:" if _is_number(cell) else "---" for cell in rows[0][2:])]
        markdown = "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ruler, *rows))
        parts.append(f"**{title}**\n\n{markdown}")
    remarks = [ranking(recipe, lines) for recipe, lines in results if recipe.select]
    remarks += by_subject(every, lambda line: line.remarks)
    for remark in remarks:
        console.print(remark, markup=False, soft_wrap=True)
    # In the file alone: the command itself prints its problems at the end.
    remarks += [f"failed: {problem}" for problem in by_subject(every, lambda line: line.problems)]
    if remarks:
        parts.append("\n".join(f"- {remark}" for remark in remarks))
    replace_file(out / "table.md", "\n\n".join(parts).encode() + b"\n")
    replace_file(out / "table.json", json.dumps(rows_of(every), indent=1, allow_nan=False).encode() + b"\n")


def rows_of(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """For scripts: plain JSON values."""
    return without_nan([{"run": line.run, "label": line.label, **line.values} for line in lines], None)


def by_subject(lines: Iterable[Line], remarks_of: Callable[[Line], Iterable[str]]) -> list[str]:
    """Each remark once, after the SAEs it is about: seeds share a name, and all SAEs of a run are named as the run."""
    labels_by_remark: dict[tuple[str, str], list[str]] = {}
    labels_of_run: dict[str, set[str]] = {}
    for line in lines:
        labels_of_run.setdefault(line.run, set()).add(line.label)
        for remark in remarks_of(line):
            labels_by_remark.setdefault((line.run, remark), []).append(line.label)
    found = []
    for (run, remark), labels in labels_by_remark.items():
        names = ", ".join(dict.fromkeys(SEED.sub("", label) for label in labels))
        found.append(f"{run}: {remark}" if set(labels) == labels_of_run[run] else f"{run}/{names}: {remark}")
    return found


def ranking(recipe: Recipe, lines: Sequence[Line]) -> str:
    """A run's SAEs by the measure that the recipe selects by. It has one seed, so this only shows where to look."""
    found = {line.label: value for line in lines if (value := line.values.get(recipe.select)) is not None}
    if not found:
        return f"{recipe.name}: nothing to select by, no SAE has {recipe.select}"
    order = sorted(found, key=lambda label: -found[label])
    values = ", ".join(f"{label} {found[label]:.4g}" for label in order)
    return f"{recipe.name}: selected by {recipe.select}: {order[0]} ({values})"


def _tables(results: Results) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """One table for all runs with one seed; for each run with several its own, and then one of its differences."""
    single = [line for recipe, lines in results if recipe.seeds == 1 for line in lines]
    if single:
        columns = _columns(single)
        cells = [[line.run, line.label, *(_cell(line.values.get(column)) for column in columns)] for line in single]
        eval_ids = dict.fromkeys(eval_id for recipe, _ in results if recipe.seeds == 1 for eval_id in recipe.evals)
        titles = titles_of(list(eval_ids))
        yield f"{results[0][0].study}: runs", ["run", "SAE", *(titles.get(one, one) for one in columns)], cells
    for recipe, lines in results:
        if recipe.seeds == 1 or not lines:
            continue
        columns, titles = _columns(lines), titles_of(recipe.evals)
        title = f"{recipe.study}: {recipe.name}"
        seeds = len({line.seed for line in lines if not is_baseline(line.family)})
        head = ["SAE", "seeds", *(titles.get(one, one) for one in columns)]
        yield f"{title}, mean ± standard deviation over seeds", head, seeded_rows(lines, columns)
        found = differences(recipe, lines)
        rows = [
            [d.label, d.against, d.measure, interval_of(d, seeds), f"{d.p_corrected:.2g}", d.verdict] for d in found
        ]
        if rows:
            head = ["SAE", "against", "measure", "difference, 95 %", "p, corrected", "found"]
            yield f"{title}, differences by seed, p corrected for all {len(rows)} (Holm)", head, rows
        if rows and recipe.name == DECISIVE:
            cells = [[one.label, one.verdict, one.why] for one in apply_rule(recipe, lines, seeds, found)]
            yield f"{title}, by the rule of docs/studies/questions.md", ["SAE", "found", "why"], cells


def apply_rule(recipe: Recipe, lines: Sequence[Line], seeds: int, found: Sequence[Difference]) -> list[Finding]:
    """The rule's findings about a run, or why it does not apply."""
    values, outside = families(lines), why_outside({line.model for line in lines if line.values}, seeds)
    if outside is not None:
        return [Finding(label, "not asked", outside) for label in methods_of(values, recipe.against)]
    return judge(values, recipe.against, found, MEASURES)


def differences(recipe: Recipe, lines: Sequence[Line]) -> list[Difference]:
    """Differences at the measures that no SAE is trained on."""
    known = {name for line in lines for name in line.values}
    values = {label: seeds for label, seeds in families(lines).items() if not is_baseline(label)}
    return compare(values, recipe.against, [name for name in MEASURES if name in known])


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
    """The mean and half of its 95 % interval, and the number of seeds if it is not all of them."""
    partly = f" (of {difference.seeds})" if difference.seeds < seeds else ""
    return f"{difference.mean:+.4g} ± {difference.half_width:.2g}{partly}"


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation if there are several."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{deviation}"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _fitting(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[Table]:
    """The table; if its numbers would not fit into the width, several, each with the first two columns."""
    columns = [Column(heading(name, head), cells) for name, cells in zip(head, zip(*rows, strict=True), strict=True)]
    names, others = columns[:2], columns[2:]
    room = width - sum(column.least_width for column in names)
    for part in split_to_fit(others, room) if all(map(_is_number, rows[0][2:])) else [others]:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in names:
            table.add_column(column.title, overflow="fold")
        for column in part:
            if _is_number(column.cells[0]):
                table.add_column(column.title, justify="right", min_width=max(map(len, column.cells)))
            else:
                table.add_column(column.title, overflow="fold")
        for cells in zip(*(column.cells for column in (*names, *part)), strict=True):
            table.add_row(*cells)
        yield table


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.lstrip("+-")[:1].isdigit()
