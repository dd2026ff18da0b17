"""How long ago each latent fired.

F latents. The counters are state of the trainer, not of the SAE: they decide which latents count
as dead.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LatentCounters:
    """Tokens since each latent fired."""

    def __init__(self, num_latents: int, device: torch.device) -> None:
        self.tokens_since_fired = torch.zeros(num_latents, dtype=torch.int64, device=device)

    def dead(self, after_tokens: int) -> Tensor:
        """bool [F], latents that have not fired in the last `after_tokens` tokens."""
        return self.tokens_since_fired >= after_tokens

    @torch.no_grad()
    def update(self, fired_F: Tensor, tokens: int) -> None:
        """Take in one global batch in which latent f fired fired_F[f] times."""
        self.tokens_since_fired += tokens
        self.tokens_since_fired[fired_F > 0] = 0

    def state(self) -> dict[str, Tensor]:
        return {"tokens_since_fired": self.tokens_since_fired}
