"""scr: whether switching latents off frees a probe from a spurious correlation.

A probe is trained where a concept (profession, category) and an attribute (gender, rating) always go together; then the
latents of the attribute are switched off, and it is tested where the two are independent. Every pair of concepts is one
task. `probing/scr_and_tpp.py` has SAEBench's steps and says what `corrected` does differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import DataMissing
from .evaluation_contract import LoadedSae, Result, remark_of
from .probing.draw_classes import Task, spurious
from .probing.scr_and_tpp import Outcome, evaluation_of, mean_scores, scr_remark, scr_scores
from .probing.source_and_settings import Settings, Source


def load_pairs(source: Source, name: str, settings: Settings) -> list[Task]:
    """One task for each pair of concepts."""
    if name not in source.pairs:
        raise DataMissing(f"{name} does not have two labels to confound: choose from {', '.join(source.pairs)}")
    pairs = source.pairs[name]
    parts = [(source.load_table(name, part == 1), size // 4) for part, size in enumerate(settings.sizes)]

    def task(pair: Mapping[str, object]) -> Task:
        one, other = pair.values()
        drawn = (spurious(table, (one, other), pairs.column2, count, settings.random_seed) for table, count in parts)
        return Task(f"{name}_scr_{'_'.join(pair)}", *drawn)

    return [task(pair) for pair in pairs.column1]


def make_result(
    subject: LoadedSae, config_json: Mapping[str, Any], outcomes: Mapping[str, Outcome], missing: str | None
) -> Result:
    """Means over pairs."""
    official = {name: scr_scores(found.official.ablated, found.official.clean) for name, found in outcomes.items()}
    corrected = {name: scr_scores(found.corrected.ablated, found.corrected.clean) for name, found in outcomes.items()}
    remark = scr_remark([found.official.clean for found in outcomes.values()])
    of_corrected = scr_remark([found.corrected.clean for found in outcomes.values()])
    return Result(
        subject,
        config_json,
        metrics={"scr_metrics": mean_scores(official)},
        details=[{"dataset_name": f"{name}_results", **found} for name, found in official.items()],
        extra={"corrected": mean_scores(corrected)},
        missing=missing,
        remark=remark_of(remark, of_corrected and f"corrected: {of_corrected}"),
    )


EVALUATION = evaluation_of(
    "scr", load_pairs, make_result, ("scr_metrics.scr_metric_threshold_10", "scr_metrics.scr_metric_threshold_50")
)
