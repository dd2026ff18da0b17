"""How long ago each latent fired.

F latents. The counters decide which latents are dead, and belong to the trainer's state, not to the SAE's. Counting
stays on the device; to list the dead latents the host must wait for their number.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LatentCounters:
    """Tokens since each latent fired."""

    def __init__(self, num_latents: int, device: torch.device) -> None:
        self.tokens_since_fired = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self._listed = torch.zeros(num_latents, dtype=torch.bool, device=device)
        self._list = torch.zeros(0, dtype=torch.int64, device=device)
        self._is_stale = True
        self._was_read = False

    def dead(self, after_tokens: int) -> Tensor:
        """bool [F], latents that have not fired in the last `after_tokens` tokens."""
        return self.tokens_since_fired >= after_tokens

    def list_dead(self, after_tokens: int, retired: Tensor | None) -> None:
        """Mark the latents that are dead now, except retired ones, for `listed`."""
        dead = self.dead(after_tokens)
        self._listed.copy_(dead if retired is None else dead & ~retired)
        self._is_stale = True

    @property
    def listed(self) -> Tensor:
        """int64, the latents that were dead at the last `list_dead`, in ascending order."""
        self._was_read = True
        if self._is_stale:
            found = self._listed.nonzero().view(-1)
            # A list of unchanged length keeps its address, from which recorded steps read.
            self._list = self._list.copy_(found) if self._list.shape == found.shape else found
            self._is_stale = False
        return self._list

    def place(self) -> tuple[int, ...]:
        """Where a recorded step finds the list; empty until a step reads it, so that an unused list is never made."""
        return (self.listed.data_ptr(), len(self._list)) if self._was_read else ()

    @torch.no_grad()
    def update(self, fired_F: Tensor, tokens: int) -> None:
        """Count one global batch, in which latent f fired fired_F[f] times."""
        self.tokens_since_fired += tokens
        self.tokens_since_fired.masked_fill_(fired_F > 0, 0)

    def state(self) -> dict[str, Tensor]:
        return {"tokens_since_fired": self.tokens_since_fired, "listed": self._listed}

    def after_load(self) -> None:
        """Drop the list, after a checkpoint has overwritten the state that it was made from."""
        self._is_stale = True
