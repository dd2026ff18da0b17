"""Gates of a curriculum: latents of a tier that is not switched on yet stay silent."""

from __future__ import annotations

from torch import Tensor

from ..kernels.codes import Codes
from ..kernels.hardware import numbers
from ..side_inputs import Side
from .shaped import Shape


class TierGates(Shape):
    """One factor for all latents of a tier, by the knob of its name; all are 1 in the end."""

    is_plain = True
    has_factor = True
    tier: Tensor

    def __init__(self, tier_F: Tensor, knobs: tuple[str, ...]) -> None:
        super().__init__()
        self.knobs = knobs
        self.register_buffer("tier", tier_F.clone())

    def factor(self, codes: Codes, side: Side, latents: Tensor | None = None) -> Tensor:
        on_T = numbers([side.knob(name, 1.0) for name in self.knobs], codes.values)
        tier = self.tier if latents is None else self.tier[latents]
        return codes.per_latent(on_T[tier])

    def follow(self, membership_F: Tensor) -> None:
        self.tier.copy_(membership_F)
