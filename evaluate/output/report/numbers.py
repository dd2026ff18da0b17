"""The table of a run: one line for each SAE, one column for each number that was measured.

An evaluation without a column here gets one for each metric of its summary.
"""

from __future__ import annotations

from collections.abc import Sequence

from ... import evals
from ...context.write_and_read_results import REACH, heading, reach_of
from ..figures.records import COLUMNS as SHARED
from ..figures.records import Column, Record, held_out, measured, notes
from .markup import Html, element, joined

COLUMNS = (
    Column("latents", "of the dictionary", lambda r: r.setting("width"), form=",.0f"),
    Column("requested L0", "k, or a target", lambda r: r.asked_l0),
    Column("penalty", "coefficient", lambda r: r.setting("penalty")),
    SHARED["l0"],
    SHARED["explained_variance"],
    held_out("with massive rows", "the same of all rows", "explained_variance_with_massive"),
    SHARED["ce_score"],
    SHARED["kl_score"],
    Column("dead", "share of latents", lambda r: r.outcome.get("dead_share")),
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
    """Columns of evaluations that are not in `COLUMNS`; results of one that is not installed stay in their files."""
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
    """The variant, shown below the name if that does not say it."""
    is_named = record.label == record.variant or record.label.startswith(f"{record.variant}_")
    return [] if is_named else [element("small", record.variant)]


def remarks(records: Sequence[Record], columns: Sequence[Column]) -> list[Html]:
    """What the numbers were measured on, and what they leave out."""
    told = notes(records, [column.evaluation for column in columns if column.evaluation])
    if any(reach(column, one) is not None for column in columns for one in records):
        told.append(f"{REACH} is the distance to the farther end of the 95 % interval over documents.")
    massive = [
        f"{record.name}: {found:,} of {found + record.outcome['validation_tokens']:,} tokens of the validation split "
        "are massive, their norm many times the median; explained variance is without."
        for record in records
        if (found := record.outcome.get("validation_massive"))
    ]
    return [element("p", line, class_="faint") for line in (*told, *massive)]


def reach(column: Column, record: Record) -> float | None:
    """The distance to the farther end of the number's interval, if its evaluation gives one."""
    if column.evaluation not in record.documents:
        return None
    return reach_of(record.documents[column.evaluation], evals.load(column.evaluation).intervals, column.metric)


def cell(record: Record, column: Column) -> Html:
    value, found = column.value(record), reach(column, record)
    if value is None:
        return element("td", "\N{EN DASH}")
    beside = [] if found is None else [element("small", f"{REACH} {found:.2g}")]
    return element("td", f"{value:{column.form}}", *beside)
