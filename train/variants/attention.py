"""Guided by one layer's attention: tokens that attend to each other should share latents.

A contrastive term added to the losses of any base (`base=topk`); see `terms/attention_guidance.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.terms_and_constraints import Assembly
from ..kit.attention_guided import Guided, build_guided, request_guided


@dataclass(frozen=True)
class Config(Guided):
    offset: int = 0
    """The layer whose attention guides, relative to the SAE's: -1 is the layer before."""

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return (self.layer + self.offset,)

    def needs(self) -> Needs:
        return request_guided(self, self.attention_layers)

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        self.needs()
        return build_guided(self, self.attention_layers, d_model, stats)
