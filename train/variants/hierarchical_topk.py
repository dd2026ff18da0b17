"""HierarchicalTopK (Balagansky et al. 2025): one top-k dictionary that is good at every k up to a maximum.

The largest 1, 2, 4, ... and all k activations of a token each reconstruct it on their own, in one pass over the
active latents. The saved SAE is a top-k one; set `sae.gate.k = 8` to use it with fewer active latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.scaling import Stats
from ..engine.schedules import Constant
from ..engine.terms_and_constraints import Assembly, Term
from ..kit.check_variant_settings import is_rising, require, require_sparsity
from ..sae.kernels.hardware import constants
from ..sae.kernels.nested_prefixes import group_errors
from ..sae.step_view import View, once
from . import topk


@dataclass(frozen=True)
class EachBudget:
    """Mean over budgets of the share of variance that the budget's largest activations leave unexplained."""

    budgets: tuple[int, ...]

    def __call__(self, view: View) -> Tensor:
        return self._parts(view)[0].mean() / view.stats.variance

    def residual(self, view: View) -> Tensor:
        return self._parts(view)[1]

    @once
    def _parts(self, view: View) -> tuple[Tensor, Tensor]:
        codes, sae = view.codes, view.sae
        falling = codes.values.detach().view(codes.num_rows, -1).argsort(dim=1, descending=True, stable=True)
        rank = falling.argsort(dim=1).view(-1)
        budget_N = torch.bucketize(rank, constants(self.budgets, rank), right=True)
        return group_errors(codes, sae.W_dec, sae.b_dec, view.target, budget_N, len(self.budgets))


@dataclass(frozen=True)
class Config(topk.Config):
    budgets: tuple[int, ...] | None = None
    """Numbers of active latents that reconstruct on their own, rising to k; None: the powers of two below k, and k."""

    def step_tables(self) -> float:
        return super().step_tables() + 1.0

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        require_sparsity(self.k, self.width)
        powers = (2**power for power in range(self.k.bit_length()))
        budgets = self.budgets or (*(budget for budget in powers if budget < self.k), self.k)
        require(
            is_rising(budgets) and budgets[-1] == self.k,
            f"budgets: expected rising numbers that end at k = {self.k}, found {budgets}",
        )
        each = EachBudget(budgets)
        term = Term("reconstruction", each, Constant(1.0), each.residual)
        return super().build(d_model, stats).replacing(term)
