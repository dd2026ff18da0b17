"""Matryoshka (Bussmann et al. 2025): BatchTopK whose nested prefixes of the dictionary each reconstruct."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.scaling import Stats
from ..engine.schedules import Constant
from ..engine.terms_and_constraints import Assembly, Term
from ..kit.check_variant_settings import ends_of, require
from ..terms.reconstruction_and_sparsity import NestedReconstruction
from . import batchtopk


@dataclass(frozen=True)
class Config(batchtopk.Config):
    prefix_fractions: tuple[float, ...] = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
    """Shares of the dictionary that reconstruct on their own, rising to 1."""
    prefix_weights: tuple[float, ...] | None = None
    """Weight of each prefix's reconstruction loss; None: 1 for each."""

    def prefixes(self) -> tuple[int, ...]:
        """The widths of the nested dictionaries."""
        return ends_of("prefix_fractions", self.prefix_fractions, self.width)

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        widths = self.prefixes()
        weights = self.prefix_weights or (1.0,) * len(widths)
        require(len(weights) == len(widths), f"prefix_weights: expected {len(widths)}, found {len(weights)}")
        require(sum(weights) > 0, f"prefix_weights: expected one or more above 0, found {weights}")
        nested = NestedReconstruction(widths, weights)
        term = Term("reconstruction", nested, Constant(1.0), nested.residual)
        return super().build(d_model, stats).replacing(term)
