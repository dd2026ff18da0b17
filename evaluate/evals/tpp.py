"""tpp: whether the latents that a class's probe relies on matter to that probe and to no other.

The n latents with the largest effect on a class's probe are switched off; the score is how much accuracy that costs the
class's probe, minus what it costs the other classes' probes. `probing/scr_and_tpp.py` has SAEBench's steps and says
what `corrected` does differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .evaluation_contract import LoadedSae, Result
from .probing.scr_and_tpp import Outcome, evaluation_of, mean_scores, tpp_scores


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
    "tpp",
    lambda source, name, settings: [source.load_task(name, *settings.sizes, settings.random_seed)],
    make_result,
    ("tpp_metrics.tpp_threshold_10_total_metric", "tpp_metrics.tpp_threshold_50_total_metric"),
)
