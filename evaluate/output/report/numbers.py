"""The table of a run: one line for each SAE, one column for each number that somebody measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..figures.records import Record
from .markup import Html, element, joined

MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Column:
    """A heading, what it means, and where the number comes from."""

    heading: str
    meaning: str
    value: Callable[[Record], float | None]


def measured(evaluation: str, path: str) -> Callable[[Record], float | None]:
    return lambda record: record.metric(evaluation, path)


def held_out(name: str) -> Callable[[Record], float | None]:
    return lambda record: record.held_out(name)


COLUMNS = (
    Column("L0", "active latents per token", held_out("l0")),
    Column("explained variance", "of held-out residuals", held_out("explained_variance")),
    Column("with massive rows", "the same of all rows", held_out("explained_variance_with_massive")),
    Column("CE score", "1 clean, 0 ablated", measured("core", "model_performance_preservation.ce_loss_score")),
    Column("KL score", "1 clean, 0 ablated", measured("core", "model_behavior_preservation.kl_div_score")),
    Column("dead", "share of latents", lambda r: r.outcome.get("dead_share")),
    Column("probing", "test accuracy, k = 5", measured("sparse_probing", "sae.sae_top_5_test_accuracy")),
    Column("tier information", "adjusted, tiers 1 and 2", measured("tiers", "tier_information.adjusted_nmi_1_2")),
    Column("composed", "share of tier 2, of few", measured("tiers", "composition.coverage_few_2")),
    Column("retention", "activation inside range", measured("position", "specialisation.retention")),
    Column("TCS short", "lags 1 to 4", measured("temporal", "consistency.tcs_short")),
    Column("FSM", "median latent", measured("temporal", "stability.fsm_median")),
    Column("lifetime", "tokens", measured("temporal", "stability.lifetime_mean")),
    Column("attention fidelity", "1 true, 0 mean ablation", measured("attention", "fidelity.score")),
)


def numbers_table(records: Sequence[Record]) -> Html:
    """Columns that nobody has a number for are left out."""
    columns = [column for column in COLUMNS if any(column.value(record) is not None for record in records)]
    headings = [
        element("th", column.heading, Html("<br>"), element("span", column.meaning, class_="faint"))
        for column in columns
    ]
    rows = [element("tr", element("td", record.name), *cells(record, columns)) for record in records]
    head = element("tr", element("th", "SAE"), *headings)
    table = element("table", element("thead", head), element("tbody", joined(rows)))
    return joined([element("h2", "Numbers"), element("div", table, class_="wide"), *notes(records)])


def notes(records: Sequence[Record]) -> list[Html]:
    """What the numbers are not about."""
    return [
        element(
            "p",
            f"{record.name}: {massive:,} of {massive + record.outcome['validation_tokens']:,} held-out tokens are "
            "massive, their norm many times the median; explained variance and L0 of held-out residuals are without.",
            class_="faint",
        )
        for record in records
        if (massive := record.outcome.get("validation_massive"))
    ]


def cells(record: Record, columns: Sequence[Column]) -> list[Html]:
    values = (column.value(record) for column in columns)
    return [element("td", MISSING if value is None else f"{value:.4g}") for value in values]
