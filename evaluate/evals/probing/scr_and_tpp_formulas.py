"""Scores of scr and tpp from the accuracies of probes before and after latents are switched off.

`Ablated[class][n][probe]` is the accuracy of a probe when the n strongest latents of a class are off.
"""

from __future__ import annotations

from collections.abc import Mapping

Accuracies = Mapping[str, float]
Ablated = Mapping[str, Mapping[int, Accuracies]]

CONCEPT, ATTRIBUTE, CONFOUNDED = "professor / nurse", "male / female", "male_professor / female_nurse"
LEAST_ROOM = 0.001  # less than this between clean and confounded leaves nothing to remove


def on_data(probe: str, data: str) -> str:
    """Key of the accuracy of one class's probe on another's data."""
    return f"{probe} probe on {data} data"


def tpp_scores(ablated: Ablated, clean: Accuracies) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Means over classes, and the scores of each class."""
    by_class: dict[str, dict[str, float]] = {name: {} for name in clean}
    for name, found in by_class.items():
        for n, accuracies in ablated[name].items():
            drops = {other: clean[other] - accuracies[other] for other in clean}
            intended = drops.pop(name)
            unintended = sum(drops.values()) / len(drops)
            found[f"tpp_threshold_{n}_total_metric"] = intended - unintended
            found[f"tpp_threshold_{n}_intended_diff_only"] = intended
            found[f"tpp_threshold_{n}_unintended_diff_only"] = unintended
    return mean_scores(by_class), by_class


def scr_scores(ablated: Ablated, clean: Accuracies) -> dict[str, float]:
    """How much of the way from confounded to clean the ablation leads, in both directions.

    The metric is the direction in which the confounded probe did worse; if both are even there is none.
    """
    scores: dict[str, float] = {}
    start = {data: clean[on_data(CONFOUNDED, data)] for data in (CONCEPT, ATTRIBUTE)}
    for direction, off, data, other in ((1, ATTRIBUTE, CONCEPT, ATTRIBUTE), (2, CONCEPT, ATTRIBUTE, CONCEPT)):
        room = clean[data] - start[data]
        for n, accuracies in ablated[off].items():
            moved = accuracies[on_data(CONFOUNDED, data)] - start[data]
            scores[f"scr_dir{direction}_threshold_{n}"] = 0 if room < LEAST_ROOM else moved / room
            if start[data] < start[other]:
                scores[f"scr_metric_threshold_{n}"] = scores[f"scr_dir{direction}_threshold_{n}"]
    return scores


def mean_scores(parts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of each score over the parts that have it, in the order in which they first appear."""
    values: dict[str, list[float]] = {}
    for part in parts.values():
        for key, value in part.items():
            values.setdefault(key, []).append(value)
    return {key: sum(found) / len(found) for key, found in values.items()}
