"""tpp: whether the latents that a class's probe relies on matter to that probe and to no other.

The n latents with the largest effect on a class's probe are switched off; the score is how much accuracy
that costs the class's probe, less what it costs the other classes' probes. `probing/scr_and_tpp.py`
has SAEBench's steps and says what `corrected` leaves out of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .evaluation_contract import Context, LoadedSae, Result
from .probing.choose_source import Source, load_all, said_of
from .probing.scr_and_tpp import Outcome, evaluation_of, perturb_all
from .probing.scr_and_tpp_formulas import mean_scores, tpp_scores
from .probing.settings import Settings, config_of_round


def disturb_probes(
    context: Context, subjects: Sequence[LoadedSae], source: Source, settings: Settings
) -> Iterator[Result]:
    """Every class of every data set, for every SAE."""
    load = source.load_task
    tasks, missing = load_all(settings.dataset_names, lambda name: [load(name, *settings.sizes, settings.random_seed)])
    names = [task.name for task in tasks]
    config_json = config_of_round(settings, context, source, "positive", names, {})
    text = said_of(source, tasks)
    for subject, outcomes in perturb_all(context, subjects, tasks, settings, "positive", lambda task: list(task.train)):
        yield replace(make_result(subject, config_json, outcomes, missing), measured_on=text)


def make_result(
    subject: LoadedSae, config_json: Mapping[str, Any], outcomes: Mapping[str, Outcome], missing: str | None
) -> Result:
    """Means over classes, then over data sets."""
    official = {name: tpp_scores(found.official.ablated, found.official.clean) for name, found in outcomes.items()}
    corrected = {name: tpp_scores(found.corrected.ablated, found.corrected.clean) for name, found in outcomes.items()}
    overall = {name: means for name, (means, _) in official.items()}
    return Result(
        subject,
        config_json,
        metrics={"tpp_metrics": mean_scores(overall)},
        details=[{"dataset_name": f"{name}_tpp_results", **means} for name, means in overall.items()],
        unstructured={name: by_class for name, (_, by_class) in official.items()},
        extra={"corrected": mean_scores({name: means for name, (means, _) in corrected.items()})},
        missing=missing,
    )


EVALUATION = evaluation_of(
    disturb_probes, ("tpp_metrics.tpp_threshold_10_total_metric", "tpp_metrics.tpp_threshold_50_total_metric")
)
