"""Who fired, and how long ago.

F latents. The counters are state of the trainer, not of the SAE: they decide which latents count as
dead, and give firing frequencies over the steps since they were last read.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LatentCounters:
    """Tokens since each latent fired, and how often it fired of late."""

    def __init__(self, num_latents: int, device: torch.device) -> None:
        self.tokens_since_fired = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.times_fired = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.tokens_counted = torch.zeros((), dtype=torch.int64, device=device)

    def dead(self, after_tokens: int) -> Tensor:
        """bool [F], latents that have not fired in the last `after_tokens` tokens."""
        return self.tokens_since_fired >= after_tokens

    @torch.no_grad()
    def update(self, fired_F: Tensor, tokens: int) -> None:
        """Take in one global batch in which latent f fired fired_F[f] times."""
        self.tokens_since_fired += tokens
        self.tokens_since_fired[fired_F > 0] = 0
        self.times_fired += fired_F
        self.tokens_counted += tokens

    def take_frequencies(self) -> Tensor:
        """float64 [F], share of tokens each latent fired on since the last call; starts afresh."""
        frequencies = self.times_fired.double() / self.tokens_counted.clamp_min(1)
        self.times_fired.zero_()
        self.tokens_counted.zero_()
        return frequencies

    def state(self) -> dict[str, Tensor]:
        return {
            "tokens_since_fired": self.tokens_since_fired,
            "times_fired": self.times_fired,
            "tokens_counted": self.tokens_counted,
        }
