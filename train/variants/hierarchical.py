"""Guided by the attention of several layers around the SAE's own, mixed by learned weights.

1. A = sum_l w_l A^l with w = softmax(theta / tau); an ablated layer has weight zero.
2. The contrastive term of `attention`, with A.
3. A consistency term: what the layers contribute to a token should agree.
Both terms are in `terms/attention_guidance.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.schedules import Constant, ExponentialApproach
from ..engine.terms_and_constraints import Assembly
from ..kit.attention_guided import Guided, build_guided, request_guided
from ..kit.check_variant_settings import require, require_least, require_positive, unread_unless
from ..sae.attention.attention_encoder import Mixing
from ..terms.attention_guidance import Objective


@dataclass(frozen=True)
class Config(Guided):
    offsets: tuple[int, ...] = (-2, -1, 0, 1)
    """The layers whose attention guides, relative to the SAE's."""
    ablated: tuple[int, ...] = ()
    """Offsets whose layers get weight zero."""
    beta: float = 0.1
    """Weight of the consistency term, relative to the guidance."""
    objective: Objective = "divergence"
    """The loss that trains the mixture; cross entropy gives all weight to the layer easiest to satisfy."""
    mixing_temperature: float = 1.0
    """tau, or its final value if mixing_temperature_start is set."""
    mixing_temperature_start: float | None = None
    mixing_temperature_steps: int = 1000
    """Steps over which tau's distance to its final value shrinks by a factor of e."""

    def unread(self) -> Mapping[str, str]:
        falls = self.mixing_temperature_start is not None
        return {
            **super().unread(),
            **unread_unless("mixing_temperature_start", falls, "mixing_temperature_steps"),
            **unread_unless("an alpha above 0", self.alpha > 0, "beta", "objective"),
        }

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(self.layer + offset for offset in sorted(self.offsets))

    def needs(self) -> Needs:
        offsets, ablated = list(self.offsets), list(self.ablated)
        require(len(set(offsets)) == len(offsets) > 0, f"offsets: expected distinct offsets, found {offsets}")
        require(set(ablated) < set(offsets), f"ablated: expected some of {offsets}, not all, found {ablated}")
        require_least(self, beta=0)
        require_positive(self, "mixing_temperature", "mixing_temperature_start", "mixing_temperature_steps")
        return request_guided(self, self.attention_layers)

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        self.needs()
        layers = self.attention_layers
        start, end = self.mixing_temperature_start, self.mixing_temperature
        falling = None if start is None else ExponentialApproach(start, end, self.mixing_temperature_steps)
        mixing = Mixing(layers, [self.layer + offset for offset in self.ablated]), falling or Constant(end)
        return build_guided(self, layers, d_model, stats, mixing=mixing, beta=self.beta, objective=self.objective)
