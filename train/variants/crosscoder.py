"""Crosscoder (Lindsey et al. 2024): one dictionary for several layers at once.

A row is the layers side by side, each scaled to the same mean norm; a latent has one activation and
a decoder row per layer. `gate = "batchtopk"` keeps whole decoder rows at length one; `gate = "relu"`
is the published form, an L1 penalty weighted by the sum of a latent's decoder norms over layers. With `causal` a latent
reads only one layer, and writes to it and to all later ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ...cache_schema.sites import RESID
from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.terms_and_constraints import Assembly
from ..kit.check_variant_settings import (
    require,
    require_hook,
    require_layers,
    require_sparsity,
    topk_optim,
    unread_unless,
)
from ..kit.single_layer import RECONSTRUCTION, Dictionary, WithAux, WithPenalty, build_plain
from ..sae.gates import BatchTopK, Relu
from ..sae.kernels.dense_products import Product
from ..terms.reconstruction_and_sparsity import LayerNormsL1
from .clt import build_cross_layer


@dataclass(frozen=True)
class Config(WithPenalty, WithAux, Dictionary):
    layers: tuple[int, ...] = (17, 18, 19, 20)
    hook: str = RESID
    gate: Literal["batchtopk", "relu"] = "batchtopk"
    k: float = 64.0
    """Mean number of active latents per token (batchtopk)."""
    penalty: float = 0.04
    """Weight of the L1 norm (relu)."""
    threshold_decay: float = 0.99
    encoder_product: Product = "bfloat16"
    causal: bool = False
    """Weakly causal: each latent reads one layer, and writes to it and to later ones (batchtopk)."""

    def unread(self) -> Mapping[str, str]:
        return {
            **super().unread(),
            **unread_unless("gate=relu", self.gate == "relu", "penalty", "penalty_warmup_fraction"),
            **unread_unless("gate=batchtopk", self.gate == "batchtopk", "k", "threshold_decay"),
        }

    def step_tables(self) -> float:
        return super().step_tables() if self.gate == "batchtopk" else 5.0

    def layers_read(self) -> int:
        return 1 if self.causal else super().layers_read()

    def needs(self) -> Needs:
        require_layers(self.layers, rising=self.causal)
        require(not self.causal or self.gate == "batchtopk", f'causal: expected gate "batchtopk", found {self.gate!r}')
        require_hook(self.hook)
        return Needs(inputs=self.layers, hook=self.hook)

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        self.needs()
        sparse, d_in = self.gate == "batchtopk", d_model * len(self.layers)
        require_sparsity(self.k if sparse else 1, self.width)
        terms = [RECONSTRUCTION, self.aux(d_model, rectified=sparse)]
        optim = topk_optim(self.optim, self.width, d_in)
        if sparse:
            gate = BatchTopK(self.k, self.threshold_decay)
            if self.causal:
                return build_cross_layer(self, gate, d_model, len(self.layers), stats)
            return build_plain(self, d_in, stats, gate, terms, optim)
        terms.append(self.penalise("l1", LayerNormsL1(len(self.layers))))
        return build_plain(self, d_in, stats, Relu(), terms, optim, constraints=())
