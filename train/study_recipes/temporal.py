"""Temporal SAEs: latents that stay the same over short, medium and long spans.

Growing windows (run_1) limit which tokens are compared. The activations always have their whole context: they were
harvested once, and a shorter context would need different activations, from a separate store for every length.
"""

from __future__ import annotations

from ..config.recipe import DECISIVE, PROBES, Recipe, Sae, as_recorded

OFF = {"temporal_weights": (0.0, 0.0, 0.0)}
SEEDED = (0.01, 0.005, 0.001)
FIRST = {
    "temporal_weights": (0.3, 0.15, 0.05),
    "adaptive": "gradient",
    "warmup_steps": 0,
    "position_gate": True,
    "progressive_window": 16,
}
CONSERVATIVE = {"temporal_weights": SEEDED, "warmup_steps": 0, "optim.clip_norm": 1.0}
WARMED = CONSERVATIVE | {"warmup_steps": 1000, "buffer_mixing": 0.5, "buffer_std": 0.1}
PROGRESSIVE = {
    "temporal_weights": SEEDED,
    "idle_steps": 500,
    "buffer_mixing": 0.5,
    "optim.clip_norm": 2.0,
    "half_life_fraction": 0.3,
    "adaptive": "variance",
}
REBUILT = {
    "temporal_weights": SEEDED,
    "idle_steps": 2000,
    "reconstruction_boost": 1.0,
    "variance_floor": 0.01,
    "prune_share": 1e-4,
    "gradient_noise": 0.01,
    "buffer_mixing": 0.25,
    "optim.clip_norm": 2.0,
}

_RUNS = (
    Recipe(
        "run_0",
        "The baseline, on shuffled tokens and on whole windows.",
        (Sae("standard", "standard"), Sae("windows", "temporal", OFF)),
    ),
    Recipe(
        "run_1",
        "Three scales with adaptive weights, a gate that reads the position, windows that grow.",
        (Sae("temporal", "temporal", FIRST),),
    ),
    Recipe("run_2", "Small fixed weights, clipped gradients.", (Sae("temporal", "temporal", CONSERVATIVE),)),
    Recipe(
        "run_3",
        "Weights that rise, and a past that starts at random.",
        (Sae("temporal", "temporal", WARMED),),
    ),
    Recipe(
        "run_4", "Late, decaying losses, scaled by each latent's variance.", (Sae("temporal", "temporal", PROGRESSIVE),)
    ),
    Recipe(
        "run_5",
        "Reconstruction first, then temporal losses; idle latents retire, gradients are noisy.",
        (Sae("temporal", "temporal", REBUILT), Sae("windows", "temporal", OFF), Sae("defaults", "temporal")),
    ),
)

EVALS = ("temporal",)
RUNS = (
    *as_recorded(_RUNS),
    Recipe(
        "headline",
        "At this package's defaults: do temporal losses keep latents on, and at what price, on the same windows?",
        (Sae("standard", "standard"), Sae("windows", "temporal", OFF), Sae("temporal", "temporal")),
        seeds=3,
        against=("windows",),
        evals=(*PROBES, "unlearning"),
    ),
    Recipe(
        "decisive",
        "at equal sparsity: does the past of the same text steady latents more than the past of another text does?",
        (
            Sae("base", "temporal", OFF),
            Sae("temporal", "temporal"),
            Sae("temporal_strongly", "temporal", {"temporal_weights": (1.0, 1.0, 1.0)}),
            Sae("other_windows", "temporal", {"other_windows": True}),
            Sae("contrasted", "tsae"),
        ),
        DECISIVE,
        seeds=5,
        against=("base", "other_windows"),
        evals=PROBES,
    ),
)
