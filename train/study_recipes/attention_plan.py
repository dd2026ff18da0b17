"""Attention guidance as planned before the ablations: everything at once, then less of it.

The controls are those of the study `attention`: `base` without guidance, `shuffled` guided by the attention
of other windows, on the same windows, seed and budget.
"""

from __future__ import annotations

from ..config.recipe import DECISIVE, PROBES, Recipe, Sae, as_recorded

_BASE = Sae("base", "hierarchical", {"alpha": 0.0})
_SHUFFLED = Sae("shuffled", "hierarchical", {"shuffle_attention": True})
_READS = {"guidance": "encode", "alpha": 0.0}
_ENCODERS = (
    Sae("encoder_alone", "hierarchical", _READS),
    Sae("encoder_shuffled", "hierarchical", {**_READS, "shuffle_attention": True}),
)
"""The encoder reads attention, with no loss that asks codes to agree with it; and the same with other windows'."""

_RUNS = (
    Recipe(
        "run_1",
        "all four layers and the contrastive loss alone",
        (_BASE, Sae("contrastive", "hierarchical"), _SHUFFLED),
        {"alpha": 0.1, "beta": 0.0},
    ),
    Recipe(
        "run_2",
        "what guidance on sparse attention costs, in time and memory: by the loss, in the encoder, and without",
        (_BASE, Sae("guided", "hierarchical"), Sae("encoder", "hierarchical", {"guidance": "encode"})),
        {"alpha": 0.1, "course.metrics_every_steps": 10},
        costs=True,
    ),
    Recipe(
        "run_3",
        "everything: four layers, learned mixing, contrast and consistency, as a loss and in the encoder",
        (
            _BASE,
            Sae("guided", "hierarchical"),
            Sae("encoder", "hierarchical", {"guidance": "encode"}),
            *_ENCODERS,
            _SHUFFLED,
        ),
        {"alpha": 0.1},
    ),
    Recipe(
        "run_4",
        "the SAE's own layer alone",
        (
            Sae("base", "attention", {"alpha": 0.0}),
            Sae("L", "attention"),
            Sae("shuffled", "attention", {"shuffle_attention": True}),
        ),
        {"alpha": 0.1, "offset": 0},
    ),
    Recipe(
        "run_5",
        "the layers next to it, without it",
        (_BASE, Sae("L-1_L+1", "hierarchical"), _SHUFFLED),
        {"alpha": 0.1, "offsets": (-1, 1)},
    ),
    Recipe(
        "run_6",
        "the parts that helped, together: four layers under a falling temperature, contrast, consistency; then tuned",
        (
            _BASE,
            Sae("combined", "hierarchical"),
            Sae("weaker", "hierarchical", {"alpha": 0.03}),
            Sae("stronger", "hierarchical", {"alpha": 0.3}),
            Sae("sharper", "hierarchical", {"temperature": 0.1}),
            Sae("no_consistency", "hierarchical", {"beta": 0.0}),
            Sae("with_encoder", "hierarchical", {"guidance": "encode"}),
            _SHUFFLED,
        ),
        {"alpha": 0.1, "mixing_temperature": 0.5, "mixing_temperature_start": 1.5},
        evals=("sparse_probing",),
        select="sae_top_5_test_accuracy",
    ),
)

EVALS = ("attention",)
RUNS = (
    *as_recorded(_RUNS),
    Recipe(
        "headline",
        "the encoder that reads attention, guidance by the loss, and neither, at this package's defaults",
        (_BASE, Sae("guided", "hierarchical"), Sae("encoder", "hierarchical", {"guidance": "encode"}), _SHUFFLED),
        {"alpha": 0.1},
        seeds=3,
        against=("base", "shuffled"),
        evals=PROBES,
    ),
    Recipe(
        "decisive",
        "two by two at equal sparsity: attention in the encoder, in the loss, in both",
        (
            _BASE,
            Sae("loss", "hierarchical"),
            Sae("encoder", "hierarchical", {"alpha": 0.0, "guidance": "encode"}),
            Sae("both", "hierarchical", {"guidance": "encode"}),
            _SHUFFLED,
            Sae("encoder_shuffled", "hierarchical", {"alpha": 0.0, "guidance": "encode", "shuffle_attention": True}),
            Sae("both_shuffled", "hierarchical", {"guidance": "encode", "shuffle_attention": True}),
        ),
        {**DECISIVE, "alpha": 0.1},
        seeds=5,
        against=("base", "loss", "shuffled", "encoder_shuffled", "both_shuffled"),
        evals=PROBES,
    ),
)
