"""Gated (Rajamanoharan et al. 2024): one path decides which latents fire, another how strongly.

The L1 penalty and a reconstruction through a frozen decoder train the gate path; the magnitude path
sees the reconstruction alone, so it does not shrink.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.compose import Assembly, Term
from ..engine.optim import Optim
from ..engine.schedules import Constant, Ramp
from ..kit.build import (
    DecoderBias,
    assemble,
    aux_term,
    require,
    require_width,
    scaled_lr,
    seeded,
    settled,
    stats_or_unit,
    tied_sae,
)
from ..sae.gates import Gated
from ..sae.model import EncoderProduct
from ..terms.constraints import UnitDecoder
from ..terms.reconstruction import reconstruction, reconstruction_by_gate
from ..terms.sparsity import gate_l1


@dataclass(frozen=True)
class Config:
    step_tables: ClassVar[float] = 10.0

    layer: int = 19
    width: int = 16384
    seed: int = 0
    penalty: float = 0.1
    penalty_warmup_fraction: float = 0.05
    """Share of the run over which the penalty rises from zero."""
    aux_weight: float = 1 / 32
    aux_k: int | None = None
    """Dead latents that each token may use; None: half of the residual width."""
    dead_after_tokens: int = 10_000_000
    decoder_bias: DecoderBias = "mean"
    encoder_product: EncoderProduct = "float32"
    optim: Optim = field(default_factory=Optim)

    def request(self) -> Needs:
        return Needs(inputs=(self.layer,))

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        require_width(self.width)
        require(self.penalty >= 0, f"penalty: expected 0 or more, found {self.penalty}")
        stats = stats_or_unit(stats, d_model)
        generator = seeded(self.seed)
        sae = tied_sae(self.width, stats, Gated(self.width), generator, self.decoder_bias, self.encoder_product)
        terms = (
            Term("reconstruction", reconstruction, Constant(1.0)),
            Term("gate_reconstruction", reconstruction_by_gate, Constant(1.0)),
            Term("gate_l1", gate_l1, Ramp(0.0, self.penalty, end_fraction=self.penalty_warmup_fraction)),
            aux_term(self.aux_k, self.aux_weight, d_model, rectified=False),
        )
        optim = settled(self.optim, lr=scaled_lr(5e-4, self.width, stats.width), beta1=0.0)
        return assemble(sae, stats, generator, optim, terms, (UnitDecoder(),), self.dead_after_tokens)
