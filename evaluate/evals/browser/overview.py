"""Results and training logs of a run's SAEs, as the browser's overview shows them.

They are written with the browser, and again whenever the run is evaluated or plotted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ....train.disk.atomic_files import replace_file
from ...context.write_and_read_results import INTERVALS, interval_of, places_in, without_nan
from ...output.figures.records import COLUMNS, Record, notes, those_of
from ...output.figures.seeds import places_of
from .browser_folder import NAME, as_data, read_data, saes_in

CURVES = ("loss", "explained_variance", "l0", "dead_share")
SPARSITY = "l0"  # what the others are drawn against


def write_numbers(browser: Path, records: Sequence[Record]) -> None:
    """Write the numbers of the weights and places that the browser shows, if it names them."""
    saes = saes_in(read_data(browser, "run") or {})
    shown = {sae["label"]: [sae.get("sha256"), *sae.get("place", places_in({}))] for sae in saes}
    records = [replace(one, documents=those_of(one.documents, shown.get(one.label))) for one in records]
    if any("core" in one.documents for one in records):  # training's own come from the validation split
        records = [replace(one, outcome={}) for one in records]
    places = places_of(records)
    value = {
        "columns": [[key, column.heading, column.meaning, key != SPARSITY] for key, column in COLUMNS.items()],
        "saes": {
            one.label: {
                "place": places[one.name],
                "numbers": numbers(one),
                "curves": curves(one),
                "explanations": explanations(one.documents.get("autointerp", {})),
            }
            for one in records
        },
        "notes": notes(records, [column.evaluation for column in COLUMNS.values()]),
    }
    replace_file(browser / "data" / "numbers.js", as_data("numbers", value).encode())  # the page may be in use


def refresh(home: Path, records: Sequence[Record]) -> None:
    """Update the numbers in a run's browser, if it has one."""
    if (home / NAME / "data").is_dir():
        write_numbers(home / NAME, records)


def numbers(record: Record) -> dict[str, dict[str, float | None]]:
    found = {}
    for key, column in COLUMNS.items():
        value = column.value(record)
        if value is not None:
            document = record.documents.get(column.evaluation)
            low, high = (document and interval_of(document, INTERVALS, column.metric)) or (None, None)
            found[key] = {"value": value, "low": low, "high": high}
    return found


def explanations(document: Mapping[str, Any]) -> dict[str, Any]:
    """What autointerp's judge wrote about latents, each with its score and its control's, and who the judge was."""
    judge, latents = document.get("judge"), document.get("eval_result_unstructured")
    answered = judge.get("answered") if isinstance(judge, Mapping) else None  # SAEBench's own names no judge
    if not isinstance(answered, list) or not isinstance(latents, Mapping):
        return {}
    explained = {
        latent: without_nan([one["explanation"], one.get("score"), one.get("control_score")], None)
        for latent, one in latents.items()
        if isinstance(one, Mapping) and isinstance(one.get("explanation"), str)
    }
    return {"judge": ", ".join(map(str, answered)), "latents": explained}


def curves(record: Record) -> dict[str, tuple[list[float], list[float]]]:
    """Logged numbers by step."""
    return {name: (steps, values) for name in CURVES for steps, values in [record.series(name)] if len(steps) > 1}
