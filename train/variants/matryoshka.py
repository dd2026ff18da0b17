"""Matryoshka (Bussmann et al. 2025): BatchTopK whose nested prefixes of the dictionary each reconstruct."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.compose import Assembly, Term
from ..engine.optim import Optim
from ..engine.schedules import Constant
from ..kit.build import (
    TOPK_DEAD_PART,
    DecoderBias,
    assemble,
    aux_term,
    require,
    require_sparsity,
    seeded,
    stats_or_unit,
    tied_sae,
    topk_optim,
)
from ..sae.gates import BatchTopK
from ..sae.model import EncoderProduct
from ..terms.constraints import UnitDecoder
from ..terms.nested import NestedReconstruction


@dataclass(frozen=True)
class Config:
    layer: int = 19
    width: int = 16384
    k: float = 64.0
    """Mean number of active latents of a token."""
    prefix_fractions: tuple[float, ...] = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
    """Shares of the dictionary that reconstruct on their own, rising to 1."""
    prefix_weights: tuple[float, ...] | None = None
    """Of each prefix's reconstruction loss; None: one each."""
    seed: int = 0
    aux_weight: float = 1 / 32
    aux_k: int | None = None
    """Dead latents that each token may use; None: half of the residual width."""
    threshold_decay: float = 0.99
    """Of the running mean of the smallest kept activation."""
    dead_after_tokens: int = 10_000_000
    dead_part: ClassVar[int] = TOPK_DEAD_PART
    decoder_bias: DecoderBias = "mean"
    encoder_product: EncoderProduct = "bfloat16"
    optim: Optim = field(default_factory=Optim)

    def request(self) -> Needs:
        return Needs(inputs=(self.layer,))

    def prefixes(self) -> tuple[int, ...]:
        """The widths of the nested dictionaries."""
        widths = tuple(round(fraction * self.width) for fraction in self.prefix_fractions)
        rising = all(low < high for low, high in zip((0, *widths), widths, strict=False))
        require(
            rising and widths[-1:] == (self.width,),
            f"prefix_fractions: expected distinct widths that rise to {self.width}, found {widths}",
        )
        return widths

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        require_sparsity(self.k, self.width)
        widths = self.prefixes()
        weights = self.prefix_weights or (1.0,) * len(widths)
        require(len(weights) == len(widths), f"prefix_weights: expected {len(widths)}, found {len(weights)}")
        stats = stats_or_unit(stats, d_model)
        generator = seeded(self.seed)
        gate = BatchTopK(self.k, self.threshold_decay)
        sae = tied_sae(self.width, stats, gate, generator, self.decoder_bias, self.encoder_product)
        terms = (
            Term("reconstruction", NestedReconstruction(widths, weights), Constant(1.0)),
            aux_term(self.aux_k, self.aux_weight, d_model),
        )
        optim = topk_optim(self.optim, self.width, stats.width)
        return assemble(sae, stats, generator, optim, terms, (UnitDecoder(),), self.dead_after_tokens)
