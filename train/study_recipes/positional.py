"""Positional SAEs: latents that belong to a part of the window, through masks, encoders or adapters.

The study describes run_7 as a part of the dictionary for each range, with its own encoder and one decoder. That is the
same as the hard mask: it appears as `sub_dictionaries`, along with encoders that share their latents.
"""

from __future__ import annotations

from ..config.recipe import DECISIVE, PROBES, Recipe, Sae, as_recorded

WHOLE = {"masked_share": 1.0}
SOFT = WHOLE | {"mask": "soft"}
SEPARATED = SOFT | {"l1_before_mask": True}
CAREFUL = SEPARATED | {"optim.clip_norm": 1.0, "optim.lr": 3e-5}
NORMED = SEPARATED | {"optim.clip_norm": 1.0, "pre_norm": True, "norm_rectified": True}
PROGRESSIVE = SOFT | {"progressive": (0.1, 0.6), "learned_coefficient": True}
ENCODERS = {"mask": "none", "range_encoders": True}
INDEPENDENT = ENCODERS | {"independent_encoders": True}
EMBEDDED = INDEPENDENT | {"init": "orthogonal", "position_embeddings": True, "pre_norm": True}
ADAPTED = {"mask": "none", "adapters": True, "adapters_on": "features", "init": "orthogonal"}
PHASES = {"adapter_from": (0.3, 0.7), "adapter_lr_scale": 0.3, "adapted_rate": 0.3, "unadapted_penalty": 0.5}
CURRICULUM = ADAPTED | PHASES

_RUNS = (
    Recipe(
        "run_0",
        "The baseline, and its latents assigned to ranges after training.",
        (Sae("standard", "standard"), Sae("static_slicing", "positional", {"mask": "static_slicing"})),
    ),
    Recipe("run_1", "Hard masks: a latent fires only in its quarter.", (Sae("hard", "positional", WHOLE),)),
    Recipe("run_2", "Soft Gaussian masks, an eighth of the window wide.", (Sae("soft", "positional", SOFT),)),
    Recipe("run_3", "The penalty sees what the mask hides.", (Sae("separated", "positional", SEPARATED),)),
    Recipe("run_4", "Clipped gradients at a tenth of the rate.", (Sae("careful", "positional", CAREFUL),)),
    Recipe("run_5", "Layer norm of what fires, before the mask.", (Sae("normed", "positional", NORMED),)),
    Recipe("run_6", "Masks that come in slowly.", (Sae("progressive", "positional", PROGRESSIVE),)),
    Recipe(
        "run_7",
        "Encoders of their own for four ranges: of all latents, and of a part for each.",
        (Sae("encoders", "positional", INDEPENDENT), Sae("sub_dictionaries", "positional")),
    ),
    Recipe(
        "run_8",
        "The same from orthogonal weights, with embeddings of the range and layer norm before the ReLU.",
        (Sae("embedded", "positional", EMBEDDED),),
    ),
    Recipe("run_9", "Gated adapters for each range, on top of a base.", (Sae("adapters", "positional", ADAPTED),)),
    Recipe(
        "run_10",
        "The base first, under half the penalty; then the adapters, at lower rates; compared with those of run_9.",
        (Sae("curriculum", "positional", CURRICULUM), Sae("adapters", "positional", ADAPTED)),
    ),
)

EVALS = ("position",)
RUNS = (
    *as_recorded(_RUNS),
    Recipe(
        "headline",
        "Strict against soft: the same share of latents masked, hard, soft, and not at all.",
        (
            Sae("static_slicing", "positional", {"mask": "static_slicing"}),
            Sae("hard", "positional"),
            Sae("soft", "positional", {"mask": "soft"}),
        ),
        seeds=3,
        against=("static_slicing",),
        evals=PROBES,
    ),
    Recipe(
        "decisive",
        "at equal sparsity: do ranges of positions help more than random sets of as many positions?",
        (
            Sae("base", "topk"),
            Sae("hard", "positional"),
            Sae("hard_scattered", "positional", {"scattered": True}),
            Sae("encoders", "positional", ENCODERS),
            Sae("encoders_scattered", "positional", ENCODERS | {"scattered": True}),
        ),
        DECISIVE,
        seeds=5,
        against=("base", "hard_scattered", "encoders_scattered"),
        evals=PROBES,
    ),
)
