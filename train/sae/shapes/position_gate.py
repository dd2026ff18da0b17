"""A gate that reads the position: activations times 2 sigmoid(a_f + u_f . e(p)).

T context, F latents, r rank. u begins at zero and a at zero, so every factor begins at exactly 1 and the
SAE at its base; without the 2 all activations would begin at half their size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.codes import Codes
from ..kernels.products_with_gradients import affine
from ..side_inputs import Side
from .shaped import Shape


class PositionGate(Shape):
    """Low rank in latents and positions."""

    needs_side = ("position",)
    has_factor = True

    def __init__(self, num_latents: int, context: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(num_latents))
        self.u = nn.Parameter(torch.zeros(num_latents, rank))
        self.e = nn.Parameter(torch.randn(context, rank, generator=generator))

    def factor(self, codes: Codes, side: Side, latents: Tensor | None = None) -> Tensor:
        a, u = (self.a, self.u) if latents is None else (self.a[latents], self.u[latents])
        return 2.0 * affine(self.e[side["position"]], None, u, a, codes.support).sigmoid()
