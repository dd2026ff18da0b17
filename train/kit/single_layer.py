"""What variants with one dictionary share: their settings, their losses, and one way to build them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...cache_schema.sites import RESID
from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.adam import Optim
from ..engine.schedules import Constant, Ramp, Schedule
from ..engine.terms_and_constraints import Assembly, Constraint, Term
from ..sae.gates import Gate
from ..sae.kernels.dense_products import Product
from ..sae.model import SparseAutoencoder, tied_weights
from ..sae.step_view import View
from ..terms.auxk import AuxK
from ..terms.constraints import UnitDecoder
from ..terms.reconstruction_and_sparsity import reconstruction
from .check_variant_settings import require, require_hook, require_least, stats_or_unit, topk_optim, unread_unless
from .variant_contract import Variant

DecoderBias = Literal["mean", "zero"]


def first_bias(kind: DecoderBias, stats: Stats) -> Tensor:
    return stats.mean.clone() if kind == "mean" else torch.zeros(stats.width)


RECONSTRUCTION = Term("reconstruction", reconstruction, Constant(1.0))


@dataclass(frozen=True)
class Dictionary(Variant):
    """Settings of every variant whose encoder starts equal to its decoder."""

    width: int = 16384
    seed: int = 0
    dead_after_tokens: int = 10_000_000
    decoder_bias: DecoderBias = "mean"
    """Initial decoder bias: the mean of the activations, or zero."""
    centre_by_mean: bool = False
    """Subtract the mean of the activations from the encoder's input while training. false: subtract the decoder's bias,
    which drifts away from the mean, or nothing if another place is reconstructed. The saved SAE never subtracts
    the mean: its encoder's biases make up for the difference."""
    encoder_product: Product = "float32"
    """The precision in which latents are chosen; their values are then computed in float32. With a dense gate, which
    does not choose, the precision of every dense product of the step."""
    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True)
class SingleLayer(Dictionary):
    """A variant that reads one layer and reconstructs it."""

    layer: int = 19
    hook: str = RESID
    """What to read of the layer: the residual stream after it, or another hook in the store."""

    def needs(self) -> Needs:
        require_hook(self.hook)
        return Needs(inputs=(self.layer,), hook=self.hook)


@dataclass(frozen=True)
class WithAux(Variant):
    """Settings of the auxiliary loss that revives dead latents."""

    aux_weight: float = 1 / 32
    aux_k: int | None = None
    """Dead latents that each token may use; None: half of the residual width."""

    def unread(self) -> Mapping[str, str]:
        return {**super().unread(), **unread_unless("an aux_weight above 0", self.aux_weight > 0, "aux_k")}

    def aux(self, d_model: int, rectified: bool = True, signed: bool = False) -> Term:
        k = d_model // 2 if self.aux_k is None else self.aux_k
        require(self.aux_k is None or k >= 1, f"aux_k: expected 1 or more (aux_weight=0 turns the loss off), found {k}")
        return Term("aux", AuxK(k, rectified, signed), Constant(self.aux_weight))


@dataclass(frozen=True)
class WithPenalty(Variant):
    """Settings of a penalty on activity."""

    penalty: float = 0.1
    penalty_warmup_fraction: float = 0.05
    """Share of the run over which the penalty rises from zero."""

    def unread(self) -> Mapping[str, str]:
        rises = unread_unless("a penalty above 0", self._penalises, "penalty_warmup_fraction")
        return {**super().unread(), **rises}

    @property
    def _penalises(self) -> bool:
        return self.penalty > 0

    def penalise(self, name: str, fn: Callable[[View], Tensor]) -> Term:
        require_least(self, penalty=0)
        return Term(name, fn, Ramp(0.0, self.penalty, end_fraction=self.penalty_warmup_fraction))


def build_plain(
    config: Dictionary,
    d_in: int,
    stats: Stats | None,
    gate: Gate,
    terms: Sequence[Term],
    optim: Optim,
    constraints: Sequence[Constraint] = (UnitDecoder(),),
    knobs: Mapping[str, Schedule] | None = None,
) -> Assembly:
    """An SAE around a gate that reconstructs its input, with unit decoder rows and an encoder equal to them."""
    stats = stats_or_unit(stats, d_in)
    generator = torch.Generator().manual_seed(config.seed)
    W_enc, W_dec = tied_weights(config.width, d_in, generator)
    b_dec = first_bias(config.decoder_bias, stats)
    mean = stats.mean.clone() if config.centre_by_mean else None
    sae = SparseAutoencoder(W_enc, W_dec, gate, b_dec, encoder_product=config.encoder_product, input_mean=mean)
    return Assembly(
        sae=sae,
        terms=tuple(terms),
        constraints=tuple(constraints),
        knobs=knobs or {},
        optim=optim,
        dead_after_tokens=config.dead_after_tokens,
        generator=generator,
        input_stats=stats,
        target_stats=stats,
    )


def assemble_mapping(
    config: Any,
    sae: SparseAutoencoder,
    d_model: int,
    generator: torch.Generator,
    stats: Stats,
    target_stats: Stats,
    *constraints: Constraint,
) -> Assembly:
    """An SAE that maps one place to another, trained like the top-k family; `config` is a `WithAux` with a width."""
    return Assembly(
        sae=sae,
        terms=(RECONSTRUCTION, config.aux(d_model)),
        constraints=(*constraints, UnitDecoder()),
        knobs={},
        optim=topk_optim(config.optim, config.width, d_model),
        dead_after_tokens=config.dead_after_tokens,
        generator=generator,
        input_stats=stats,
        target_stats=target_stats,
    )
