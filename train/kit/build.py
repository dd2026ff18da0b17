"""Small pieces that the variants' `build` functions share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..data.scaling import Stats, unit_stats
from ..engine.compose import Assembly, Constraint, Term
from ..engine.optim import Optim
from ..engine.schedules import Constant, Schedule
from ..errors import ConfigInvalid
from ..sae.gates import Gate
from ..sae.model import EncoderProduct, SparseAutoencoder, tied_weights
from ..terms.auxk import AuxK

DecoderBias = Literal["mean", "zero"]

DEAD_PART = 10
"""A latent that did not fire for this part of the budget is dead at the latest."""
TOPK_DEAD_PART = 30
"""The same for the top-k family: fewer dead latents in the end than at a tenth, and no worse reconstruction, at
every variant tried; a hundredth part made half of a matryoshka dictionary die (`bench/quality.py`)."""
# [B, F] in float32 that a step holds at its peak, measured: pre-activations in bfloat16 and float32 alone, where the
# activations are sparse. A variant whose activations are dense, if only in its first steps, says `step_tables`.
SPARSE_TABLES = 1.5


def seeded(seed: int) -> torch.Generator:
    """The SAE's own source of randomness."""
    return torch.Generator().manual_seed(seed)


def require(condition: bool, message: str) -> None:
    """Refuse a setting that cannot be satisfied."""
    if not condition:
        raise ConfigInvalid(message)


def require_width(width: int) -> None:
    require(width >= 1, f"width: expected 1 or more, found {width}")


def require_sparsity(k: float, width: int) -> None:
    require_width(width)
    require(0 < k <= width, f"k: expected more than 0 and at most width = {width}, found {k}")


def most_active(d_model: int) -> int:
    """Defaults never ask for more active latents than this: papers' settings are for wider models."""
    return max(1, d_model // 4)


def dead_after(tokens: int, config: Any) -> int:
    """The part of a budget after which a latent counts as dead, where the variant's default is more."""
    return max(1, tokens // getattr(config, "dead_part", DEAD_PART))


def scaled_lr(lr_at_16k: float, width: int, d_model: int) -> float:
    """lr / sqrt(F / 2^14), the scaling that top-k SAEs are published with, at a residual as wide as Gemma-2-2B's.

    Adam turns a unit decoder row of D entries by about lr * sqrt(D) a step, so that the narrower
    residual takes the larger rate for the same turn.
    """
    return lr_at_16k / (width / 2**14) ** 0.5 * (2304 / d_model) ** 0.5


def settled(optim: Optim, **own: float) -> Optim:
    """The settings, with the variant's own where none was given."""
    return replace(optim, **{name: value for name, value in own.items() if getattr(optim, name) is None})


def topk_optim(optim: Optim, width: int, d_model: int) -> Optim:
    """The settings, with those of the top-k family where none was given.

    The rate at 2^14 latents is twice what such SAEs are published with: better at every k and width tried
    (`bench/quality.py`), at the price of a few dead latents where the dictionary is wide and k small.
    """
    return settled(optim, lr=scaled_lr(4e-4, width, d_model), epsilon=6.25e-10)


def tied_sae(
    width: int,
    stats: Stats,
    gate: Gate,
    generator: torch.Generator,
    decoder_bias: DecoderBias,
    encoder_product: EncoderProduct,
) -> SparseAutoencoder:
    """Unit decoder rows, an encoder equal to them, and a decoder bias at the mean or at zero."""
    W_enc, W_dec = tied_weights(width, stats.width, generator)
    b_dec: Tensor = stats.mean.clone() if decoder_bias == "mean" else torch.zeros(stats.width)
    return SparseAutoencoder(W_enc, W_dec, gate, b_dec=b_dec, encoder_product=encoder_product)


def aux_term(k: int | None, weight: float, d_model: int, rectified: bool = True) -> Term:
    """What keeps latents alive; without `k`, half of the residual's width."""
    require(k is None or k >= 1, f"aux_k: expected 1 or more (aux_weight=0 turns the loss off), found {k}")
    return Term("aux", AuxK(d_model // 2 if k is None else k, rectified), Constant(weight))


def assemble(
    sae: SparseAutoencoder,
    stats: Stats,
    generator: torch.Generator,
    optim: Optim,
    terms: Sequence[Term],
    constraints: Sequence[Constraint],
    dead_after_tokens: int,
    knobs: Mapping[str, Schedule] | None = None,
    target_stats: Stats | None = None,
) -> Assembly:
    """An assembly whose target is its input unless `target_stats` says otherwise."""
    return Assembly(
        sae=sae,
        terms=tuple(terms),
        constraints=tuple(constraints),
        knobs=dict(knobs or {}),
        optim=optim,
        dead_after_tokens=dead_after_tokens,
        generator=generator,
        input_stats=stats,
        target_stats=target_stats or stats,
    )


def stats_or_unit(stats: Stats | None, width: int) -> Stats:
    """The given statistics, or those of activations that are scaled and centred already."""
    if stats is None:
        return unit_stats(width)
    require(stats.width == width, f"statistics: expected width {width}, found {stats.width}")
    return stats
