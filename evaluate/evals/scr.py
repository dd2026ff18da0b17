"""scr: whether switching latents off frees a probe of a spurious correlation.

A probe is trained where a concept (profession, category) and an attribute (gender, rating) always go
together; then the latents of the attribute are switched off and it is tested where they are independent.
Every pair of concepts is one task. `probing/scr_and_tpp.py` has SAEBench's steps and says
what `corrected` leaves out of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .evaluation_contract import Context, LoadedSae, Result
from .probing.choose_source import Source, load_all, said_of
from .probing.draw_classes import OPPOSITES, Task, spurious
from .probing.scr_and_tpp import Outcome, evaluation_of, perturb_all
from .probing.scr_and_tpp_formulas import mean_scores, scr_scores
from .probing.settings import Settings, config_of_round


def free_probes(
    context: Context, subjects: Sequence[LoadedSae], source: Source, settings: Settings
) -> Iterator[Result]:
    """Every pair of concepts, for every SAE."""
    tasks, missing = load_all(settings.dataset_names, lambda name: load_pairs(source, name, settings))
    used = [name for name in settings.dataset_names if any(task.name.startswith(f"{name}_scr_") for task in tasks)]
    pairs = {name: [list(pair) for pair in source.pairs[name].column1] for name in used}
    config_json = config_of_round(settings, context, source, "absolute", used, pairs)
    text = said_of(source, tasks)
    for subject, outcomes in perturb_all(context, subjects, tasks, settings, "absolute", lambda _: list(OPPOSITES)):
        yield replace(make_result(subject, config_json, outcomes, missing), measured_on=text)


def load_pairs(source: Source, name: str, settings: Settings) -> list[Task]:
    """One task for each pair of concepts."""
    pairs = source.pairs_of(name)
    tables = [
        (source.load_table(name, is_test), size) for is_test, size in zip((False, True), settings.sizes, strict=True)
    ]

    def task(positive: str, negative: str) -> Task:
        concepts = pairs.values[positive], pairs.values[negative]
        train, test = (
            spurious(table, concepts, pairs.column2, size // 4, settings.random_seed) for table, size in tables
        )
        return Task(f"{name}_scr_{positive}_{negative}", train, test)

    return [task(*pair) for pair in pairs.column1]


def make_result(
    subject: LoadedSae, config_json: Mapping[str, Any], outcomes: Mapping[str, Outcome], missing: str | None
) -> Result:
    """Means over pairs."""
    official = {name: scr_scores(found.official.ablated, found.official.clean) for name, found in outcomes.items()}
    corrected = {name: scr_scores(found.corrected.ablated, found.corrected.clean) for name, found in outcomes.items()}
    return Result(
        subject,
        config_json,
        metrics={"scr_metrics": mean_scores(official)},
        details=[{"dataset_name": f"{name}_results", **found} for name, found in official.items()],
        extra={"corrected": mean_scores(corrected)},
        missing=missing,
    )


EVALUATION = evaluation_of(free_probes, ("scr_metrics.scr_metric_threshold_10", "scr_metrics.scr_metric_threshold_50"))
