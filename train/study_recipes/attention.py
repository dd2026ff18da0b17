"""Hierarchical attention guidance: which layers' attention helps, and how best to mix them.

Every run includes its controls, on the same windows, seed and budget: `base` is the same SAE
without guidance, `shuffled` is guided by the attention of other windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config.recipe import DECISIVE, PROBES, Recipe, Sae, as_recorded


def _with_controls(variant: str, settings: Mapping[str, Any]) -> tuple[Sae, ...]:
    """A guided SAE, the same without guidance, and the same guided by other windows' attention."""
    return (
        Sae("base", variant, {**settings, "alpha": 0.0}),
        Sae("guided", variant, settings),
        Sae("shuffled", variant, {**settings, "shuffle_attention": True}),
    )


_COMBINATIONS = {
    "L-1": (-1,),
    "L": (0,),
    "L+1": (1,),
    "L-1_L": (-1, 0),
    "L_L+1": (0, 1),
    "L-1_L_L+1": (-1, 0, 1),
    "L-2_L-1_L_L+1": (-2, -1, 0, 1),
}
_THREE = (-1, 0, 1)
_ANNEALED = {"mixing_temperature": 0.5, "mixing_temperature_start": 1.5, "mixing_temperature_steps": 1000}

_RUNS = (
    Recipe("run_0", "the standard SAE, which everything is compared with", (Sae("standard", "standard"),)),
    Recipe(
        "run_1",
        "does the attention of the SAE's own layer help?",
        _with_controls("attention", {"offset": 0, "alpha": 0.1}),
    ),
    Recipe(
        "run_2",
        "two layers, mixed by learned weights and asked to agree",
        _with_controls("hierarchical", {"offsets": (-1, 0), "alpha": 0.1}),
    ),
    Recipe(
        "run_3",
        "three layers: the next one too",
        _with_controls("hierarchical", {"offsets": _THREE, "alpha": 0.1}),
    ),
    Recipe(
        "run_4",
        "which layers does it take? Every combination side by side",
        (
            Sae("base", "hierarchical", {"offsets": _THREE, "alpha": 0.0}),
            *(Sae(label, "hierarchical", {"offsets": found}) for label, found in _COMBINATIONS.items()),
            Sae("shuffled", "hierarchical", {"offsets": _THREE, "shuffle_attention": True}),
        ),
        {"alpha": 0.1},
    ),
    Recipe(
        "run_5",
        "a mixture that is flat at first and sharp in the end: tau(t) = exp(-t / 1000) + 0.5",
        _with_controls("hierarchical", {"offsets": _THREE, "alpha": 0.1, **_ANNEALED}),
    ),
    Recipe(
        "run_6",
        "how mixture and contributions develop: all four layers, logged closely",
        _with_controls("hierarchical", {"alpha": 0.1, **_ANNEALED}),
        {"course.metrics_every_steps": 10},
        evals=("browser",),
    ),
)

EVALS = ("attention",)
RUNS = (
    *as_recorded(_RUNS),
    Recipe(
        "headline",
        "does guidance by all four layers pay at this package's defaults, and is it the attention that does it?",
        _with_controls("hierarchical", {"alpha": 0.1}),
        seeds=3,
        against=("base", "shuffled"),
        evals=PROBES,
    ),
    Recipe(
        "decisive",
        "at equal sparsity: does attention guidance help what it is not trained on, more than links that any text has?",
        (
            *_with_controls("hierarchical", {"alpha": 0.1}),
            Sae("guided_strongly", "hierarchical", {"alpha": 1.0}),
            Sae("nearest", "hierarchical", {"alpha": 0.1, "links": "nearest"}),
            Sae("same_token", "hierarchical", {"alpha": 0.1, "links": "same_token"}),
        ),
        DECISIVE,
        seeds=5,
        against=("base", "shuffled", "nearest", "same_token"),
        evals=PROBES,
    ),
)
