"""Skip transcoder (Paulo et al. 2025): a transcoder plus an affine map of its input.

The map reconstructs the part of the target that is linear in the input, so that latents do not have to. It starts at
zero. The saved SAE adds it in `sae(x)`; `decode` returns what the latents write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..data.scaling import Stats
from ..engine.terms_and_constraints import Assembly
from ..sae.model import SparseAutoencoder
from . import transcoder


@dataclass(frozen=True)
class Config(transcoder.Config):
    gate: Literal["topk", "batchtopk"] = "batchtopk"

    def build(self, d_model: int, stats: Stats | None = None, target_stats: Stats | None = None) -> Assembly:
        assembly = super().build(d_model, stats, target_stats)
        parts = assembly.sae.parts()
        parts["W_skip"] = torch.zeros(assembly.sae.d_out, assembly.sae.d_in)
        return assembly.with_sae(SparseAutoencoder(**parts))
