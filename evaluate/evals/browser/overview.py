"""What was measured and logged of a run's SAEs, as the browser's overview shows it.

It is written with the browser, and anew whenever the run is evaluated or drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ....train.disk.atomic_files import replace_file
from ...context.results import INTERVALS, interval_of
from ...output.figures.records import CORE, Record, thinned
from .write_pages import NAME, as_data

CURVES = ("loss", "explained_variance", "l0", "dead_share")


@dataclass(frozen=True)
class Column:
    """A number of the table: where it comes from, and what it means in a few words."""

    key: str
    heading: str
    meaning: str
    evaluation: str
    path: str
    is_fidelity: bool = False
    """Whether it is drawn against sparsity."""


COLUMNS = (
    Column(
        "l0",
        "L0",
        "active latents a token, on held-out text where that was measured, else in all that was read here",
        "core",
        CORE["l0"],
    ),
    Column(
        "explained_variance",
        "explained variance",
        "centred; 1 is all of it",
        "core",
        CORE["explained_variance"],
        is_fidelity=True,
    ),
    Column(
        "ce_score",
        "CE score",
        "cross entropy restored: 1 the model's own, 0 as bad as zero ablation",
        "core",
        CORE["ce_score"],
        is_fidelity=True,
    ),
    Column(
        "kl_score",
        "KL score",
        "predictions restored: 1 the model's own, 0 as bad as zero ablation",
        "core",
        CORE["kl_score"],
        is_fidelity=True,
    ),
    Column(
        "probing",
        "probing",
        "test accuracy of probes on five latents",
        "sparse_probing",
        "sae.sae_top_5_test_accuracy",
        is_fidelity=True,
    ),
    Column(
        "attention",
        "attention fidelity",
        "how the next layer attends: 1 as from the true residual, 0 as from its mean",
        "attention",
        "fidelity.score",
        is_fidelity=True,
    ),
)


def write_numbers(browser: Path, records: Sequence[Record]) -> None:
    """Into a browser's folder."""
    value = {
        "columns": [[column.key, column.heading, column.meaning, column.is_fidelity] for column in COLUMNS],
        "saes": {record.label: {"numbers": numbers(record), "curves": curves(record)} for record in records},
    }
    replace_file(browser / "data" / "numbers.js", as_data("numbers", value).encode())  # the page is there already


def refresh(home: Path, records: Sequence[Record]) -> None:
    """What a run's browser says of its SAEs, where it has a browser."""
    if (home / NAME / "data").is_dir():
        write_numbers(home / NAME, records)


def numbers(record: Record) -> dict[str, dict[str, float | None]]:
    found = {}
    for column in COLUMNS:
        is_held_out = CORE.get(column.key) == column.path
        value = record.held_out(column.key) if is_held_out else record.metric(column.evaluation, column.path)
        if value is not None:
            document = record.documents.get(column.evaluation)
            low, high = (document and interval_of(document, INTERVALS, column.path)) or (None, None)
            found[column.key] = {"value": value, "low": low, "high": high}
    return found


def curves(record: Record) -> dict[str, tuple[list[float], list[float]]]:
    """Logged numbers by step, thinned out."""
    short = replace(record, log=thinned(record.log))
    return {name: (steps, values) for name in CURVES for steps, values in [short.series(name)] if len(steps) > 1}
