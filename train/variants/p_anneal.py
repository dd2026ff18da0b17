"""P-anneal (Karvonen et al. 2024): a standard SAE whose L1 penalty becomes an Lp^p penalty with falling p.

Whenever p falls, the coefficient changes so that the current batch's penalty stays the same; the coefficient so far is
the gate's buffer `penalty_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..data.scaling import Stats
from ..engine.schedules import Next, Ramp
from ..engine.terms_and_constraints import Assembly
from ..kit.check_variant_settings import relu_optim, require
from ..kit.single_layer import RECONSTRUCTION, SingleLayer, WithAux, WithPenalty, build_plain
from ..sae.gates import AnnealedRelu
from ..terms.reconstruction_and_sparsity import lp


@dataclass(frozen=True)
class Config(WithPenalty, WithAux, SingleLayer):
    p_start: float = 1.0
    p_end: float = 0.2
    anneal_begin_fraction: float = 0.15
    """Share of the run during which p keeps its initial value."""

    def step_tables(self) -> float:
        return 11.0

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        require(0 < self.p_end <= self.p_start, f"p: expected 0 < p_end <= p_start, found {self.p_end}, {self.p_start}")
        gate = AnnealedRelu(unit=d_model**0.5)
        terms = (RECONSTRUCTION, self.penalise("lp", lp), self.aux(d_model, rectified=False))
        p = Ramp(self.p_start, self.p_end, begin_fraction=self.anneal_begin_fraction)
        optim = relu_optim(self.optim, self.width, d_model)
        return build_plain(self, d_model, stats, gate, terms, optim, knobs={"p": p, "next_p": Next(p)})
