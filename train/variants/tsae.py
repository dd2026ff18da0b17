"""T-SAE (Bhalla et al. 2025): a matryoshka whose first part has similar codes for neighbouring tokens.

A contrastive loss tells neighbours from all other pairs of the batch by their codes: the first part of the dictionary
collects what a passage is about, and the rest is left with what changes from token to token. Other tokens of the same
window are not negatives, since their topic is often the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.schedules import Constant
from ..engine.terms_and_constraints import Assembly, Term
from ..kit.check_variant_settings import require_least, require_positive
from ..sae.step_view import View
from ..terms.temporal import part_of, past_rows
from . import matryoshka

EXCLUDED = -1e9  # the score of a pair that is not a candidate


@dataclass(frozen=True)
class Contrast:
    """InfoNCE in both directions between each row and the row before it, on the first latents; negatives come from this
    rank."""

    stop: int
    temperature: float

    def __call__(self, view: View) -> Tensor:
        codes = functional.normalize(part_of(view.codes, 0, self.stop).dense(), dim=1, eps=1e-6)
        past, window = past_rows(view.side, 1), view.side["window"]
        held = past >= 0
        scores = codes @ codes[past].t() / self.temperature  # rows by the rows before each
        own = torch.diagonal(scores)
        rivals = (window[:, None] != window) & held & held[:, None]
        rivals.diagonal().copy_(held)
        scores = torch.where(rivals, scores, EXCLUDED)
        lost = 0.5 * (scores.logsumexp(0) + scores.logsumexp(1)) - own
        return torch.where(held, lost, 0.0).sum() / view.side.ranks.share(held.sum())


@dataclass(frozen=True)
class Config(matryoshka.Config):
    prefix_fractions: tuple[float, ...] = (0.2, 1.0)
    contrast_weight: float = 0.1
    temperature: float = 0.2
    """Temperature of the softmax over cosines."""

    def step_tables(self) -> float:
        return super().step_tables() + 2.0

    def needs(self) -> Needs:
        return replace(super().needs(), windows=True, documents=True, least_windows=2)

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        require_least(self, contrast_weight=0)
        require_positive(self, "temperature")
        contrast = Term("contrast", Contrast(self.prefixes()[0], self.temperature), Constant(self.contrast_weight))
        return super().build(d_model, stats).with_terms(contrast)
