"""P-anneal (Karvonen et al. 2024): a standard SAE whose L1 penalty becomes an Lp^p penalty, p falling.

Whenever p falls the coefficient changes so that the penalty of the batch at hand stays what it was;
the running coefficient is the gate's buffer `penalty_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.compose import Assembly, Term
from ..engine.optim import Optim
from ..engine.schedules import Ahead, Constant, Ramp
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
from ..sae.gates import AnnealedRelu
from ..sae.model import EncoderProduct
from ..terms.constraints import UnitDecoder
from ..terms.reconstruction import reconstruction
from ..terms.sparsity import lp


@dataclass(frozen=True)
class Config:
    step_tables: ClassVar[float] = 11.0

    layer: int = 19
    width: int = 16384
    seed: int = 0
    penalty: float = 0.1
    penalty_warmup_fraction: float = 0.05
    """Share of the run over which the penalty rises from zero."""
    p_start: float = 1.0
    p_end: float = 0.2
    anneal_begin_fraction: float = 0.15
    """Share of the run during which p keeps its first value."""
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
        require(0 < self.p_end <= self.p_start, f"p: expected 0 < p_end <= p_start, found {self.p_end}, {self.p_start}")
        stats = stats_or_unit(stats, d_model)
        generator = seeded(self.seed)
        gate = AnnealedRelu(unit=d_model**0.5)
        sae = tied_sae(self.width, stats, gate, generator, self.decoder_bias, self.encoder_product)
        terms = (
            Term("reconstruction", reconstruction, Constant(1.0)),
            Term("lp", lp, Ramp(0.0, self.penalty, end_fraction=self.penalty_warmup_fraction)),
            aux_term(self.aux_k, self.aux_weight, d_model, rectified=False),
        )
        p = Ramp(self.p_start, self.p_end, begin_fraction=self.anneal_begin_fraction)
        knobs = {"p": p, "next_p": Ahead(p, 1)}
        optim = settled(self.optim, lr=scaled_lr(5e-4, self.width, stats.width))
        return assemble(sae, stats, generator, optim, terms, (UnitDecoder(),), self.dead_after_tokens, knobs)
