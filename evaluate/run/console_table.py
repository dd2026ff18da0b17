"""The report on the console: tables of the main numbers, and why others are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from ...cache_schema.cli import open_console
from ...cache_schema.strict_json import flatten
from .. import evals
from ..context.loaded_sae import LoadedSae
from ..context.write_and_read_results import (
    REACH,
    Row,
    first_few,
    heading,
    lines_of_each,
    metric_of,
    ours_in,
    reach_of,
    rounded_to,
    settings_in,
)
from ..errors import Incomparable
from .find_saes_to_evaluate import Absent, say_absent

MISSING = "-"
PIPE_WIDTH = 160
NOTHING_LEARNED = {
    "sparsity.l0": (0.0, "no latents"),
    "saemill_metrics.explained_variance": (0.0, "the mean"),
    "model_performance_preservation.ce_loss_score": (0.0, "zeros in its place"),
    "model_behavior_preservation.kl_div_score": (0.0, "zeros in its place"),
    "misc_metrics.frac_alive": (0.0, "no latents"),
    "sae.sae_top_5_test_accuracy": (0.5, "guessing"),
}
NUMBER_WIDTH = 9  # of a number in four digits; a heading may take several lines instead
GAP = 2  # between columns


@dataclass(frozen=True)
class Column:
    """One metric for all SAEs."""

    title: str
    cells: Sequence[str]

    @property
    def width(self) -> int:
        """Including the gap before it, with the title on one line."""
        return max(self.least_width, GAP + len(self.title))

    @property
    def least_width(self) -> int:
        """The same with one word of the title per line."""
        return GAP + max(NUMBER_WIDTH, *map(len, (*self.title.split(), *self.cells)))


def make_console(*, is_stderr: bool = False) -> Console:
    """The console for the report; a pipe gets room for a wide table."""
    console = open_console(stderr=is_stderr, highlight=False, soft_wrap=True, markup=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def print_results(console: Console, rows: Sequence[Row], absent: Sequence[Absent] = ()) -> None:
    """Print the tables, warnings about numbers that cannot be right, then what is missing and why."""
    good = [row for row in rows if row.document is not None]
    names_of = shown_names(row.subject for row in rows)
    if good:
        for title, table in make_tables(good, names_of, console.width):
            if title:
                console.print(title, style="bold")
            console.print(table)
        for line in measured_on(good, names_of):
            console.print(line, style="dim")
    for row in good:
        if signs := signs_of_no_learning(row.document or {}):
            console.print(f"warning: {names_of[row.subject]}: {'; '.join(signs)}")
    names_by_reason: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.reason:
            names_by_reason.setdefault((row.status, row.eval_id, row.reason), []).append(names_of[row.subject])
    in_files = {ours_in(row.document).get("remark") for row in good if row.document is not None}
    problems, remarks = list[str](), list[str]()
    for (status, eval_id, reason), names in names_by_reason.items():
        line = f"{status}: {eval_id} of {', '.join(names)}: {reason}"
        (remarks if reason in in_files else problems).append(line)
    for line in (*problems, *first_few(remarks), *say_absent(absent)):
        console.print(line)
    for home in dict.fromkeys(row.subject.home for row in good):
        console.print(f"results: {home / 'evals'}")


def shown_names(subjects: Iterable[LoadedSae]) -> dict[LoadedSae, str]:
    """The name of each SAE; if several share it, with the folder."""
    unique = dict.fromkeys(subjects)
    times = Counter(subject.name for subject in unique)
    return {one: one.name if times[one.name] == 1 else f"{one.name} ({one.folder})" for one in unique}


def document_of(rows: Sequence[Row], problems: Sequence[Exception], absent: Sequence[Absent]) -> dict[str, Any]:
    """The report as JSON: the metrics of each evaluation's summary, the distance from each to the farther end of its
    interval, and the text they were measured on; whole results are in the files."""
    names_of = shown_names(row.subject for row in rows)
    return {
        "results": [
            {
                "sae": names_of[row.subject],
                "evaluation": row.eval_id,
                "status": row.status,
                "reason": row.reason,
                "metrics": {metric: value for metric, (value, _) in numbers_of(row).items()},
                "reach": {metric: reach for metric, (_, reach) in numbers_of(row).items()},
                "measured_on": ours_in(row.document or {}).get("measured_on"),
                "warnings": signs_of_no_learning(row.document or {}),
                "file": None if row.document is None else str(row.path),
            }
            for row in rows
        ],
        "problems": [*map(str, problems)],
        "absent": {str(one.folder): one.reason for one in absent},
    }


def make_tables(rows: Sequence[Row], names_of: Mapping[LoadedSae, str], width: int) -> Iterator[tuple[str, Table]]:
    """One row per SAE and one column per metric in the evaluations' summaries, in one table without a title. If that
    would be wider than `width`, each evaluation has its own, or several; if there are several evaluations, the first of
    each is titled."""
    found = {(row.subject, row.eval_id): numbers_of(row) for row in rows}
    subjects = list(dict.fromkeys(row.subject for row in rows))
    columns: dict[str, list[Column]] = {}
    for eval_id in dict.fromkeys(row.eval_id for row in rows):
        summary = evals.load(eval_id).summary
        cells = {m: [_cell(*found.get((one, eval_id), {}).get(m, (None, None))) for one in subjects] for m in summary}
        columns[eval_id] = [Column(heading(metric, summary), values) for metric, values in cells.items()]
    names = [names_of[subject] for subject in subjects]
    room = width - min(max(map(cell_len, ("SAE", *names))), width // 2)
    prefixes = {eval_id: f"{eval_id}: " if len(columns) > 1 else "" for eval_id in columns}
    every = [Column(prefixes[eval_id] + one.title, one.cells) for eval_id, own in columns.items() for one in own]
    for eval_id, own in ({"": every} if sum(one.least_width for one in every) <= room else columns).items():
        for number, part in enumerate(split_to_fit(own, room)):
            is_roomy = sum(one.width for one in part) <= room
            table = Table(box=None, pad_edge=False, header_style="bold")
            table.add_column("SAE", width=width - room, overflow="fold")
            for one in part:
                table.add_column(one.title, justify="right", width=(one.width if is_roomy else one.least_width) - GAP)
            for name, *cells in zip(names, *(one.cells for one in part), strict=True):
                table.add_row(name, *cells)
            yield "" if number or len(columns) == 1 else eval_id, table


def split_to_fit(columns: Sequence[Column], room: int) -> list[list[Column]]:
    """Consecutive groups of columns, each as many as fit side by side."""
    parts: list[list[Column]] = []
    for column in columns:
        if parts and sum(one.least_width for one in (*parts[-1], column)) <= room:
            parts[-1].append(column)
        else:
            parts.append([column])
    return parts


def measured_on(rows: Sequence[Row], names_of: Mapping[LoadedSae, str]) -> list[str]:
    """Lines on the text that the numbers were measured on, and on what a reach is."""
    lines = lines_of_each([(names_of[row.subject], row.eval_id, row.document or {}) for row in rows])
    if any(reach is not None for row in rows for _, reach in numbers_of(row).values()):
        lines.append(f"{REACH} is the distance to the farther end of the 95 % interval over documents")
    return lines


def numbers_of(row: Row) -> dict[str, tuple[float | None, float | None]]:
    """Each metric in the evaluation's summary, with its reach; empty without a result."""
    evaluation, document = evals.load(row.eval_id), row.document
    if document is None:
        return {}
    return {m: (metric_of(document, m), reach_of(document, evaluation.intervals, m)) for m in evaluation.summary}


def require_one_store(subjects: Iterable[LoadedSae]) -> None:
    """Refuse SAEs of several stores: they saw different tokens, so their numbers do not compare."""
    by_id: dict[str, list[str]] = {}
    for subject, name in shown_names(subjects).items():
        if subject.cache_id is not None:  # one without is measured on whichever store it is given
            by_id.setdefault(subject.cache_id, []).append(name)
    if len(by_id) > 1:
        listed = "; ".join(f"{cache_id}: {', '.join(names)}" for cache_id, names in by_id.items())
        raise Incomparable(
            f"--compare: expected SAEs of one store, found cache ids {listed}. Compare those of one "
            "id, or give --cache one store to measure all of them on"
        )


def require_comparable(rows: Sequence[Row]) -> None:
    """Require that all results of an evaluation have the same settings, so that they can share a table."""
    names_of = shown_names(row.subject for row in rows)
    for eval_id in dict.fromkeys(row.eval_id for row in rows):
        found = {row.subject: row.document for row in rows if row.eval_id == eval_id and row.document is not None}
        settings = {names_of[subject]: flatten(settings_in(document)) for subject, document in found.items()}
        for key in sorted({key for values in settings.values() for key in values}):
            names_by_value: dict[str, list[str]] = {}
            for name, values in settings.items():
                names_by_value.setdefault(repr(values.get(key)), []).append(name)
            if len(names_by_value) > 1:
                listed = "; ".join(f"{value} in {', '.join(names)}" for value, names in names_by_value.items())
                raise Incomparable(
                    f"{eval_id} was run with different {key} ({listed}). "
                    "Evaluate them again with the same settings, without --compare"
                )


def _cell(value: float | None, reach: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.4g}" if reach is None else f" {REACH} ".join(rounded_to(value, reach))


def signs_of_no_learning(document: Mapping[str, Any]) -> list[str]:
    """The metrics of a result that are no better than without any training."""
    return [
        f"{metric.rsplit('.', 1)[-1]} {value:.4g}, no better than {what} ({bound:g})"
        for metric, (bound, what) in NOTHING_LEARNED.items()
        if (value := metric_of(document, metric)) is not None and value <= bound
    ]
