"""JumpReLU (Rajamanoharan et al. 2024): a learned threshold, trained with straight-through gradients to a target L0.

Thresholds and bandwidth are in units of the mean norm of the activations, as published; Adam steps
them in those units too, or they would hardly move from their start. With `sparsity=tanh` (Conerly et al. 2025) the
penalty has gradients to all parameters and no target: `penalty` / `target_l0` determines how many latents fire.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..data.scaling import Stats
from ..engine.schedules import Constant, Ramp
from ..engine.terms_and_constraints import Assembly, Term
from ..kit.check_variant_settings import (
    EARLY_DEAD_PART,
    relu_optim,
    require_least,
    require_positive,
    require_sparsity,
    unread_unless,
)
from ..kit.single_layer import RECONSTRUCTION, SingleLayer, WithPenalty, build_plain
from ..sae.gates import JumpRelu
from ..terms.constraints import NonNegative, UnitDecoder
from ..terms.reconstruction_and_sparsity import Frequency, TanhL0, TargetL0, dead_thresholds


@dataclass(frozen=True)
class Config(WithPenalty, SingleLayer):
    target_l0: float = 64.0
    penalty: float = 1.0
    penalty_warmup_fraction: float = 0.1
    initial_threshold: float = 0.001
    """Initial threshold with optim.start=drawn; a fitted start places thresholds where `target_l0` latents fire."""
    bandwidth: float = 0.001
    dead_penalty: float = 3e-3
    """Weight of the sum of the dead latents' thresholds, which lowers them until these latents fire."""
    sparsity: Literal["target", "tanh"] = "target"
    """What is penalised: the squared distance of L0 from its target, or a smooth L0."""
    sharpness: float = 4.0
    """Sharpness of the smooth L0 (sparsity = "tanh")."""
    frequency_penalty: float = 0.0
    """Weight of the squared firing frequency of each latent (Smith et al. 2025), added to the penalty on L0."""
    common_share: float = 0.1
    """Share of tokens at which the frequency penalty on a latent equals its contribution to L0."""

    def unread(self) -> Mapping[str, str]:
        return {
            **super().unread(),
            **unread_unless("optim.start=drawn", self.optim.start == "drawn", "initial_threshold"),
            **unread_unless("sparsity=tanh", self.sparsity == "tanh", "sharpness"),
            **unread_unless("frequency_penalty", self.frequency_penalty > 0, "common_share"),
        }

    @property
    def _penalises(self) -> bool:
        """The frequency penalty rises with the other, even where that is 0."""
        return super()._penalises or self.frequency_penalty > 0

    def dead_part(self) -> int:
        return EARLY_DEAD_PART

    def step_tables(self) -> float:
        return 7.0

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        require_sparsity(self.target_l0, self.width, "target_l0")
        require_positive(self, "bandwidth", "sharpness")
        require_positive(self, "common_share", most=1)
        require_least(self, frequency_penalty=0, initial_threshold=0)
        gate = JumpRelu(self.width, self.initial_threshold, self.bandwidth, d_model**0.5, self.target_l0)
        is_tanh = self.sparsity == "tanh"
        l0 = TanhL0(self.target_l0, self.sharpness) if is_tanh else TargetL0(self.target_l0)
        terms = [
            RECONSTRUCTION,
            self.penalise("l0", l0),
            Term("dead", dead_thresholds, Constant(self.dead_penalty)),
        ]
        if self.frequency_penalty > 0:
            rising = Ramp(0.0, self.frequency_penalty, end_fraction=self.penalty_warmup_fraction)
            terms.append(Term("frequency", Frequency(self.target_l0, self.common_share), rising))
        optim = relu_optim(self.optim, self.width, d_model, beta1=0.0)
        constraints = (UnitDecoder(), NonNegative(("gate.raw_threshold",)))
        return build_plain(self, d_model, stats, gate, terms, optim, constraints)
