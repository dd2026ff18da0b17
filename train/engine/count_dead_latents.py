"""How long ago each latent fired.

F latents. The counters are state of the trainer, not of the SAE: they decide which latents count
as dead. Counting happens on the device; a list of the dead has a length, for which the host must wait.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LatentCounters:
    """Tokens since each latent fired."""

    def __init__(self, num_latents: int, device: torch.device) -> None:
        self.tokens_since_fired = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self._listed = torch.zeros(num_latents, dtype=torch.bool, device=device)
        self._numbers = torch.zeros(0, dtype=torch.int64, device=device)
        self._is_old = True
        self._is_read = False

    def dead(self, after_tokens: int) -> Tensor:
        """bool [F], latents that have not fired in the last `after_tokens` tokens."""
        return self.tokens_since_fired >= after_tokens

    def list_dead(self, after_tokens: int, retired: Tensor | None) -> None:
        """Store which latents are dead now, for `listed`, except retired ones."""
        dead = self.dead(after_tokens)
        self._listed.copy_(dead if retired is None else dead & ~retired)
        self._is_old = True

    @property
    def listed(self) -> Tensor:
        """int64, the latents that were dead at the last `list_dead`, in ascending order."""
        self._is_read = True
        if self._is_old:
            found = self._listed.nonzero().view(-1)
            # At its old address if it fits, where a recorded step reads it.
            self._numbers = self._numbers.copy_(found) if self._numbers.shape == found.shape else found
            self._is_old = False
        return self._numbers

    def place(self) -> tuple[int, ...]:
        """Where a recorded step finds the list; empty as long as no step has read it, so that it need not be made."""
        return (self.listed.data_ptr(), len(self._numbers)) if self._is_read else ()

    @torch.no_grad()
    def update(self, fired_F: Tensor, tokens: int) -> None:
        """Count one global batch, in which latent f fired fired_F[f] times."""
        self.tokens_since_fired += tokens
        self.tokens_since_fired.masked_fill_(fired_F > 0, 0)

    def state(self) -> dict[str, Tensor]:
        return {"tokens_since_fired": self.tokens_since_fired, "listed": self._listed}

    def after_load(self) -> None:
        """After a checkpoint has overwritten the state: drop what was derived from it."""
        self._is_old = True
