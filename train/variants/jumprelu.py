"""JumpReLU (Rajamanoharan et al. 2024): a learned threshold, trained straight through to a target L0.

Thresholds and bandwidth are in units of the mean norm of the activations, as published; Adam steps
them in those units too, or they would hardly move from where they start.
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
    require,
    require_sparsity,
    scaled_lr,
    seeded,
    settled,
    stats_or_unit,
    tied_sae,
)
from ..sae.gates import JumpRelu
from ..sae.model import EncoderProduct
from ..terms.constraints import NonNegativeThreshold, UnitDecoder
from ..terms.reconstruction import reconstruction
from ..terms.sparsity import DeadPreActivation, TargetL0


@dataclass(frozen=True)
class Config:
    step_tables: ClassVar[float] = 7.0

    layer: int = 19
    width: int = 16384
    target_l0: float = 64.0
    seed: int = 0
    penalty: float = 1.0
    penalty_warmup_fraction: float = 0.1
    """Share of the run over which the penalty rises from zero."""
    initial_threshold: float = 0.001
    bandwidth: float = 0.001
    dead_penalty: float = 3e-6
    """Weight of how far the dead latents' pre-activations are below their thresholds."""
    dead_after_tokens: int = 10_000_000
    decoder_bias: DecoderBias = "mean"
    encoder_product: EncoderProduct = "float32"
    optim: Optim = field(default_factory=Optim)

    def request(self) -> Needs:
        return Needs(inputs=(self.layer,))

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        require_sparsity(self.target_l0, self.width)
        require(self.bandwidth > 0, f"bandwidth: expected a positive number, found {self.bandwidth}")
        stats = stats_or_unit(stats, d_model)
        generator = seeded(self.seed)
        gate = JumpRelu(self.width, self.initial_threshold, self.bandwidth, unit=d_model**0.5)
        sae = tied_sae(self.width, stats, gate, generator, self.decoder_bias, self.encoder_product)
        penalty = Ramp(0.0, self.penalty, end_fraction=self.penalty_warmup_fraction)
        terms = (
            Term("reconstruction", reconstruction, Constant(1.0)),
            Term("l0", TargetL0(self.target_l0), penalty),
            Term("dead", DeadPreActivation(), Constant(self.dead_penalty)),
        )
        constraints = (UnitDecoder(), NonNegativeThreshold())
        optim = settled(self.optim, lr=scaled_lr(5e-4, self.width, stats.width), beta1=0.0)
        return assemble(sae, stats, generator, optim, terms, constraints, self.dead_after_tokens)
