"""What a study recorded for an SAE that was never trained, and how to tell one.

gemma-2-2b, layer 19, SAEBench's core evaluation, training steps 0 (the sparse probing score of 0.5 at every k is
of layer 5). A run that does no better has failed, and says so itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..context.results import metric_of

UNTRAINED: Mapping[str, float] = {
    "sparsity.l0": 0.0,
    "saemill_metrics.explained_variance": -0.785,
    "model_performance_preservation.ce_loss_score": -0.586,
    "model_behavior_preservation.kl_div_score": -0.528,
    "misc_metrics.frac_alive": 0.0,
    "sae.sae_top_5_test_accuracy": 0.5,
}
NAME, RECORDED = "never trained", "what a study recorded for gemma-2-2b, layer 19, after no training step"


def untrained_traits(document: Mapping[str, Any]) -> list[str]:
    """Metrics of a result that are no better than those of an SAE that was never trained."""
    found = {metric: metric_of(document, metric) for metric in UNTRAINED}
    return [
        f"{metric.rsplit('.', 1)[-1]} {value:.4g}, as if never trained ({UNTRAINED[metric]:g})"
        for metric, value in found.items()
        if value is not None and value <= UNTRAINED[metric]
    ]
