"""Standard (Bricken et al. 2023): ReLU and an L1 penalty, decoder rows of length one.

The penalty is on activations divided by sqrt(D), against the share of variance left unexplained, so that a value means
the same at every width of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..data.scaling import Stats
from ..engine.terms_and_constraints import Assembly
from ..kit.check_variant_settings import relu_optim
from ..kit.single_layer import RECONSTRUCTION, SingleLayer, WithAux, WithPenalty, build_plain
from ..sae.gates import Relu
from ..terms.reconstruction_and_sparsity import l1


@dataclass(frozen=True)
class Config(WithPenalty, WithAux, SingleLayer):
    width: int = 2304

    def step_tables(self) -> float:
        return 5.0

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        terms = (RECONSTRUCTION, self.penalise("l1", l1), self.aux(d_model, rectified=False))
        optim = relu_optim(self.optim, self.width, d_model)
        return build_plain(self, d_model, stats, Relu(), terms, optim)
