"""Tiered SAEs: three nested tiers, how much each counts, and what higher tiers are composed of.

Gradients are divided by a tier's loss only where that is over 1, which the study's run_4 wanted against explosions:
dividing by small losses too would duplicate the learned importance in the same run.
"""

from __future__ import annotations

from ..config.recipe import DECISIVE, PROBES, Recipe, Sae, as_recorded

EQUAL = (1 / 3, 1 / 3, 1 / 3)
FIRST = {"importance": "fixed", "tier_weights": EQUAL}
RESAMPLED = {"resample_every_steps": 100, "aux_weight": 0.0}
MOVES = {"moves_every_steps": 100, "moves_live": True}
LEARNED = {"importance": "uncertainty", "tier_weights": EQUAL, "optim.clip_norm": 1.0}
INITIALISED = {
    "importance": "uncertainty",
    "init": "xavier",
    "optim.clip_norm": 5.0,
    "optim.warmup_power": 3.0,
    "optim.warmup_steps": 2000,
    "tier_weights": (0.1, 0.3, 0.6),
}
SCALED = INITIALISED | {"gradient_scaling": True, "optim.weight_decay": 1e-4, "tier_grad_norms": True}
NEXT = {
    "init": "xavier",
    "tier_norm": True,
    "tier_clip_norm": 5.0,
    "optim.clip_norm": 5.0,
    "optim.warmup_power": 3.0,
    "optim.warmup_steps": 2000,
    "curriculum": (0.0, 0.1, 0.2),
    **MOVES,
}

_RUNS = (
    Recipe("run_0", "The baseline: one flat dictionary.", (Sae("standard", "standard"),)),
    Recipe(
        "run_1",
        "Three fixed tiers of equal weight; dead latents restart instead of the auxiliary loss.",
        (Sae("tiered", "tiered", FIRST | RESAMPLED),),
    ),
    Recipe("run_2", "Learned importance of the tiers, clipped gradients.", (Sae("tiered", "tiered", LEARNED),)),
    Recipe("run_3", "Xavier weights and a slow, cubic warm-up.", (Sae("tiered", "tiered", INITIALISED),)),
    Recipe("run_4", "Scaled gradients and weight decay, norms logged.", (Sae("tiered", "tiered", SCALED),)),
    Recipe(
        "run_5",
        "Layer norm between tiers, clipping by tier, latents that move if the loss falls, tiers that come one by one.",
        (
            Sae("standard", "standard"),
            Sae("tiered", "tiered"),
            Sae("next_steps", "tiered", NEXT),
            Sae("moves", "tiered", MOVES),
            Sae("curriculum", "tiered", {"curriculum": (0.0, 0.1, 0.2)}),
        ),
    ),
)

EVALS = ("tiers",)
RUNS = (
    *as_recorded(_RUNS),
    Recipe(
        "headline",
        "At this package's defaults: do three tiers pay, against one flat dictionary and against fixed importance?",
        (Sae("standard", "standard"), Sae("tiered", "tiered"), Sae("fixed", "tiered", FIRST)),
        seeds=3,
        against=("standard",),
        evals=(*PROBES, "unlearning"),
    ),
    Recipe(
        "decisive",
        "at equal sparsity: do tiers that compose beat nested ones that do not, and a Matryoshka of equal parts?",
        (
            Sae("base", "topk"),
            Sae("matryoshka", "matryoshka"),
            Sae("nested", "tiered", {"composition_weight": 0.0}),
            Sae("composed", "tiered", {"composition_weight": 0.01}),
            Sae("composed_strongly", "tiered", {"composition_weight": 0.1}),
            Sae("tree", "treesae"),
            Sae("orthogonal", "ortsae"),
        ),
        DECISIVE,
        seeds=5,
        against=("base", "matryoshka", "nested"),
        evals=PROBES,
    ),
)
