"""The intervention: firing latents of the topic are set to a negative value. W windows, T tokens, K latents, D width.

The protocol decodes codes twice, as they are (f) and clamped (f'), and keeps the error of the first:
x' = decode(f') + x - decode(f). A decoder is linear, so this is x + (f' - f) W_dec, and only the K
clamped latents differ. Position 0 (BOS) is encoded as zeros in both, so it stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clamp_shift(acts_WTK: Tensor, W_dec_KD: Tensor, multiplier: float) -> Tensor:
    """What clamping adds to the residual: [W, T, D]. The value is -multiplier, whatever the latent's scale."""
    fires = acts_WTK > 0
    fires[:, 0] = False
    change_WTK = torch.where(fires, -multiplier - acts_WTK, torch.zeros_like(acts_WTK))
    return change_WTK @ W_dec_KD
