"""Gated (Rajamanoharan et al. 2024): one path decides which latents fire, another how strongly.

The L1 penalty and a reconstruction through a frozen decoder train the gate path; the magnitude path
sees only the reconstruction, so it does not shrink.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..data.scaling import Stats
from ..engine.schedules import Constant
from ..engine.terms_and_constraints import Assembly, Term
from ..kit.check_variant_settings import relu_optim
from ..kit.single_layer import RECONSTRUCTION, SingleLayer, WithAux, WithPenalty, build_plain
from ..sae.gates import Gated
from ..terms.reconstruction_and_sparsity import gate_l1, reconstruction_by_gate


@dataclass(frozen=True)
class Config(WithPenalty, WithAux, SingleLayer):
    def step_tables(self) -> float:
        return 10.0

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        terms = (
            RECONSTRUCTION,
            Term("gate_reconstruction", reconstruction_by_gate, Constant(1.0)),
            self.penalise("gate_l1", gate_l1),
            self.aux(d_model, rectified=False),
        )
        optim = relu_optim(self.optim, self.width, d_model, beta1=0.0)
        return build_plain(self, d_model, stats, Gated(self.width), terms, optim)
