"""BatchTopK (Bussmann et al. 2024): the k B largest of a batch of B tokens; a threshold at inference."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.scaling import Stats
from ..engine.terms_and_constraints import Assembly
from ..kit.check_variant_settings import EARLY_DEAD_PART, require_sparsity, topk_optim
from ..kit.single_layer import RECONSTRUCTION, SingleLayer, WithAux, build_plain
from ..sae.gates import BatchTopK
from ..sae.kernels.dense_products import Product


@dataclass(frozen=True)
class Config(WithAux, SingleLayer):
    k: float = 64.0
    """Mean number of active latents per token."""
    threshold_decay: float = 0.99
    """Decay of the running mean of the smallest kept activation."""
    centre_by_mean: bool = True
    encoder_product: Product = "bfloat16"

    def dead_part(self) -> int:
        return EARLY_DEAD_PART

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        require_sparsity(self.k, self.width)
        gate = BatchTopK(self.k, self.threshold_decay)
        optim = topk_optim(self.optim, self.width, d_model)
        return build_plain(self, d_model, stats, gate, (RECONSTRUCTION, self.aux(d_model)), optim)
