"""OrtSAE (Korznikov et al. 2025): BatchTopK with a penalty on decoder rows that point the same way.

The penalty is the squared cosine of each decoder row with the nearest row in its chunk. The dictionary is split into
new random chunks each time, so that the cost grows with the width, not with its square.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.scaling import Stats
from ..engine.schedules import Every
from ..engine.terms_and_constraints import Assembly, Term
from ..kit.check_variant_settings import require, require_least
from ..sae.kernels.sparse_products_with_gradients import rows_of
from ..sae.step_view import View
from . import batchtopk


@dataclass(frozen=True)
class Overlap:
    """Mean over decoder rows of the squared cosine with the nearest row of the same chunk."""

    chunk: int

    def __call__(self, view: View) -> Tensor:
        W_dec, generator = view.sae.W_dec, view.generator
        order = view.draw(lambda: torch.randperm(len(W_dec), generator=generator))
        parts = W_dec[order].tensor_split(-(-len(W_dec) // self.chunk))
        overlaps = (_nearest_cosine(part).square().sum() for part in parts if len(part) > 1)  # a lone row has none
        return sum(overlaps, W_dec.new_zeros(())) / len(W_dec)


def _nearest_cosine(rows: Tensor) -> Tensor:
    """Cosine of each row, of length one, with its nearest; only these two rows get its gradient."""
    with torch.no_grad():
        nearest = (rows @ rows.t()).fill_diagonal_(-torch.inf).argmax(1)
    return torch.linalg.vecdot(rows, rows_of(rows, nearest)).clamp_min(0.0)


@dataclass(frozen=True)
class Config(batchtopk.Config):
    overlap_weight: float = 0.25
    chunk: int = 8192
    """Largest number of decoder rows that are compared with each other."""
    every_steps: int = 5
    """Steps between comparisons."""

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        require_least(self, overlap_weight=0, chunk=2, every_steps=1)
        require(self.width >= 2, f"width: expected 2 or more latents to compare, found {self.width}")
        overlap = Term("overlap", Overlap(self.chunk), Every(self.every_steps, self.overlap_weight))
        return super().build(d_model, stats).with_terms(overlap)
