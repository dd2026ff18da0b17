"""The table of a run, with a line for each SAE and a column for each number that was measured; and the data for its
page's script: curves of all that was logged, which SAEs differ only by seed, and the run's progress.

An evaluation without a column here gets one for each metric of its summary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ... import evals
from ...context.write_and_read_results import REACH, heading, reach_of, rounded_to
from ..figures.records import COLUMNS as SHARED
from ..figures.records import CORE, Column, Record, measured, notes
from ..figures.seeds import groups_of
from .markup import Html, element, joined


def with_massive(record: Record) -> float | None:
    """Explained variance of all rows, if some are massive."""
    massive = record.metric("core", "saemill_metrics.massive.tokens") or record.outcome.get("validation_massive")
    return record.held_out("explained_variance_with_massive") if massive else None


COLUMNS = (
    Column("latents", "of the dictionary", lambda r: r.setting("width"), form=",.0f"),
    Column("requested L0", "k, or a target", lambda r: r.asked_l0),
    Column("penalty", "coefficient", lambda r: r.setting("penalty")),
    SHARED["l0"],
    SHARED["explained_variance"],
    Column("with massive rows", "the same over all rows", with_massive),
    SHARED["ce_score"],
    SHARED["kl_score"],
    Column("dead", "of latents, at the end of training", lambda r: r.outcome.get("dead_share")),
    SHARED["probing"],
    measured("tier information", "adjusted, tiers 1 and 2", "tiers", "tier_information.adjusted_nmi_1_2"),
    measured("composed", "share of tier 2, of few", "tiers", "composition.coverage_few_2"),
    measured("retention", "activation inside range", "position", "specialisation.retention"),
    measured("TCS short", "lags 1 to 4", "temporal", "consistency.tcs_short"),
    measured("FSM", "median latent", "temporal", "stability.fsm_median"),
    measured("lifetime", "tokens", "temporal", "stability.lifetime_mean"),
    SHARED["attention"],
)


def summary_columns(records: Sequence[Record]) -> list[Column]:
    """Columns of evaluations that are not in `COLUMNS`. Results of one that is not installed stay in their files."""
    shown = {column.evaluation for column in COLUMNS}
    found = dict.fromkeys(name for record in records for name in record.documents if name not in shown)
    return [
        measured(heading(metric, evals.load(name).summary), name, name, metric)
        for name in found
        if name in evals.names()
        for metric in evals.load(name).summary
    ]


def numbers_table(records: Sequence[Record]) -> Html:
    """The table; columns without any number are left out."""
    every = (*COLUMNS, *summary_columns(records))
    columns = [column for column in every if any(column.value(record) is not None for record in records)]
    headings = [
        element("th", column.heading, Html("<br>"), element("span", column.meaning, class_="faint"))
        for column in columns
    ]
    rows = [
        element("tr", element("td", record.name, *variant(record)), *(cell(record, column) for column in columns))
        for record in records
    ]
    head = element("tr", element("th", "SAE"), *headings)
    table = element("table", element("thead", head), element("tbody", joined(rows)))
    return joined([element("h2", "Numbers"), element("div", table, class_="wide"), *remarks(records, columns)])


def variant(record: Record) -> list[Html]:
    """The variant, below a name that does not include it."""
    is_named = record.label == record.variant or record.label.startswith(f"{record.variant}_")
    return [] if is_named else [element("small", record.variant)]


def remarks(records: Sequence[Record], columns: Sequence[Column]) -> list[Html]:
    """What the numbers were measured on, and what they leave out."""
    lines = notes(records, [column.evaluation for column in columns if column.evaluation])
    if any(reach(column, one) is not None for column in columns for one in records):
        lines.append(f"{REACH} is the distance to the farther end of the 95 % interval over documents.")
    massive = [
        f"{record.name}: {found:,} of {found + record.outcome['validation_tokens']:,} tokens of the validation split "
        "are massive, their norm many times the median; explained variance leaves them out."
        for record in records
        if (found := record.outcome.get("validation_massive"))
    ]
    return [element("p", line, class_="faint") for line in (*lines, *massive)]


def reach(column: Column, record: Record) -> float | None:
    """The distance to the farther end of the number's interval, if its evaluation gives one."""
    if column.evaluation not in record.documents:
        return None
    return reach_of(record.documents[column.evaluation], evals.load(column.evaluation).intervals, column.metric)


def cell(record: Record, column: Column) -> Html:
    value, found = column.value(record), reach(column, record)
    if value is None:
        return element("td", "\N{EN DASH}")
    if found is None:
        return element("td", f"{value:{column.form}}")
    number, distance = rounded_to(value, found)
    return element("td", number, element("small", f"{REACH} {distance}"))


DIGITS = 5


def training_data(records: Sequence[Record], course: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The data for the script; `course` is the progress of a run that has not ended."""
    is_measured = any("core" in record.documents for record in records)  # training's own numbers are from other text
    groups = groups_of(records)
    saes = [{"name": r.name, "group": groups[r.name], **_curves(r), **_quality(r, is_measured)} for r in records]
    return {"saes": saes, "course": course, "is_measured": is_measured}


def course_of(records: Sequence[Record], steps: int, pause: float) -> dict[str, Any]:
    """The progress of a run, and the seconds until it is written again."""
    ends = [record.log[-1] for record in records if record.log]
    last = max(ends, key=lambda line: line.get("step", 0), default={"step": -1})
    speed = {"tokens_per_second": _rounded(last.get("tokens_per_second")) or 0.0}
    step = last.get("step", 0) + 1
    return {"step": step, "steps": steps, **speed, "written": time.time(), "pause": pause}


def _curves(record: Record) -> dict[str, Any]:
    log = record.log
    values = {name: [_rounded(line.get(name)) for line in log] for name in sorted(record.logged - {"sae", "step"})}
    return {
        "steps": [line["step"] for line in log],
        "curves": {name: found for name, found in values.items() if any(value is not None for value in found)},
    }


def _quality(record: Record, is_measured: bool) -> dict[str, float | None]:
    """Core's numbers if it measured any SAE, otherwise training's: on held-out text or, while it runs, last logged."""
    names = ("l0", "explained_variance")
    if is_measured:
        return {name: _rounded(record.metric("core", CORE[name])) for name in names}
    return {
        name: _rounded(record.outcome.get(name, record.last(name) if record.steps is None else None)) for name in names
    }


def _rounded(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")
