"""Crosscoder (Lindsey et al. 2024): one dictionary for several layers at once.

A row is the layers side by side, each scaled to the same mean norm; a latent has one activation and
a decoder row per layer. `gate = "batchtopk"` keeps whole decoder rows at length one; `gate = "relu"`
is the published form, an L1 penalty weighted by the sum of a latent's decoder norms over layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.compose import Assembly, Constraint, Term
from ..engine.optim import Optim
from ..engine.schedules import Constant, Ramp
from ..kit.build import (
    SPARSE_TABLES,
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
from ..sae.gates import BatchTopK, Gate, Relu
from ..sae.model import EncoderProduct
from ..terms.constraints import UnitDecoder
from ..terms.reconstruction import reconstruction
from ..terms.sparsity import LayerNormsL1


@dataclass(frozen=True)
class Config:
    layers: tuple[int, ...] = (17, 18, 19, 20)
    width: int = 16384
    gate: Literal["batchtopk", "relu"] = "batchtopk"
    k: float = 64.0
    """Mean number of active latents of a token (batchtopk)."""
    penalty: float = 0.04
    """Of the L1 norm (relu)."""
    penalty_warmup_fraction: float = 0.05
    seed: int = 0
    aux_weight: float = 1 / 32
    aux_k: int | None = None
    """Dead latents that each token may use; None: half of the residual width."""
    threshold_decay: float = 0.99
    dead_after_tokens: int = 10_000_000
    decoder_bias: DecoderBias = "mean"
    encoder_product: EncoderProduct = "bfloat16"
    optim: Optim = field(default_factory=Optim)

    @property
    def step_tables(self) -> float:
        return SPARSE_TABLES if self.gate == "batchtopk" else 5.0

    def request(self) -> Needs:
        require(
            len(set(self.layers)) == len(self.layers) > 0,
            f"layers: expected one or more distinct layers, found {self.layers}",
        )
        return Needs(inputs=self.layers)

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        sparse = self.gate == "batchtopk"
        require_sparsity(self.k if sparse else 1, self.width)
        stats = stats_or_unit(stats, d_model * len(self.layers))
        generator = seeded(self.seed)
        gate: Gate = BatchTopK(self.k, self.threshold_decay) if sparse else Relu()
        sae = tied_sae(self.width, stats, gate, generator, self.decoder_bias, self.encoder_product)
        terms = [
            Term("reconstruction", reconstruction, Constant(1.0)),
            aux_term(self.aux_k, self.aux_weight, d_model, rectified=sparse),
        ]
        if not sparse:
            penalty = Ramp(0.0, self.penalty, end_fraction=self.penalty_warmup_fraction)
            terms.append(Term("l1", LayerNormsL1(len(self.layers)), penalty))
        constraints: tuple[Constraint, ...] = (UnitDecoder(),) if sparse else ()
        optim = topk_optim(self.optim, self.width, stats.width)
        return assemble(sae, stats, generator, optim, terms, constraints, self.dead_after_tokens)
