"""AbsTopK (Zhu et al. 2025): the k pre-activations furthest from zero, with their signs.

A latent stands for a direction and its opposite, for which a rectified SAE needs two. Evaluations, and tools that
support no signed SAEs, get an equivalent top-k SAE with two latents for each signed one.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..data.scaling import Stats
from ..engine.terms_and_constraints import Assembly
from ..kit.check_variant_settings import require_sparsity, topk_optim
from ..kit.single_layer import RECONSTRUCTION, build_plain
from ..sae.gates import AbsTopK
from . import topk


@dataclass(frozen=True)
class Config(topk.Config):
    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        require_sparsity(self.k, self.width)
        terms = (RECONSTRUCTION, self.aux(d_model, rectified=False, signed=True))
        optim = topk_optim(self.optim, self.width, d_model)
        return build_plain(self, d_model, stats, AbsTopK(self.k), terms, optim)
