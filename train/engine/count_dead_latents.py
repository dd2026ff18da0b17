"""How long ago each latent fired.

F latents. The counters decide which latents are dead, and belong to the trainer's state, not to the SAE's. Counting
stays on the device. To list the dead latents the host must wait for their number, so on a GPU they are listed at looks,
in memory that stays where it is and with some others up to one of few sizes: recorded steps read that memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.batch import rounded_up
from ..sae.step_view import DeadLatents


class LatentCounters:
    """Tokens since each latent fired."""

    def __init__(self, num_latents: int, device: torch.device) -> None:
        self.tokens_since_fired = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self._marked = torch.zeros(num_latents, dtype=torch.bool, device=device)
        self._order = torch.arange(num_latents, device=device)
        self._length = 0
        self._is_stale = True
        self._was_read = False

    def dead(self, after_tokens: int) -> Tensor:
        """bool [F], latents that have not fired in the last `after_tokens` tokens."""
        return self.tokens_since_fired >= after_tokens

    def list_dead(self, after_tokens: int, retired: Tensor | None) -> None:
        """Mark the latents that are dead now, except retired ones, for `listed`."""
        dead = self.dead(after_tokens)
        self._marked.copy_(dead if retired is None else dead & ~retired)
        self._is_stale = True

    @property
    def listed(self) -> DeadLatents:
        """The latents that were dead at the last `list_dead`, then some others, each in ascending order."""
        self._was_read = True
        self._make_list()
        latents = self._order[: self._length]
        return DeadLatents(latents, self._marked[latents])

    def list_length(self) -> int | None:
        """None until a step has read the list: an unread list is never made."""
        if not self._was_read:
            return None
        self._make_list()
        return self._length

    def _make_list(self) -> None:
        if self._is_stale:
            self._order.copy_(torch.argsort(self._marked.byte(), descending=True, stable=True))
            self._length = min(rounded_up(int(self._marked.sum())), len(self._order))
            self._is_stale = False

    @torch.no_grad()
    def update(self, fired_F: Tensor, tokens: int) -> None:
        """Count one global batch, in which latent f fired fired_F[f] times."""
        self.tokens_since_fired += tokens
        self.tokens_since_fired.masked_fill_(fired_F > 0, 0)

    def state(self) -> dict[str, Tensor]:
        return {"tokens_since_fired": self.tokens_since_fired, "listed": self._marked}

    def after_load(self) -> None:
        """Drop the list, after a checkpoint has overwritten the state that it was made from."""
        self._is_stale = True
