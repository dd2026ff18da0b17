"""The strongest activations of each latent over a stream of tokens, and the words they were on.

N tokens, F latents, K kept. A token is known by its number: these count the kept tokens of a pass in the order they
were read. Without a tokenizer a token is written as its id.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...context.context import Context
from ...errors import ModelMissing
from ...model.batches import Windows


@dataclass(frozen=True, eq=False)
class Strongest:
    """The K largest activations of each latent, and on which tokens they were; 0 at -1 where it fired less often."""

    values: Tensor  # float32
    places: Tensor  # int64, numbers of tokens as they were given

    @staticmethod
    def none(kept: int, latents: int, device: torch.device | str = "cpu") -> Strongest:
        return Strongest(
            torch.zeros(kept, latents, device=device),
            torch.full((kept, latents), -1, dtype=torch.int64, device=device),
        )

    def with_batch(self, acts_NF: Tensor, places_N: Tensor) -> Strongest:
        """The same after more tokens."""
        kept = len(self.values)
        values, rows = acts_NF.topk(min(kept, len(acts_NF)), dim=0)
        places = torch.where(values > 0, places_N[rows], -1)
        values, chosen = torch.cat([self.values, values.clamp_min(0)]).topk(kept, dim=0)
        return Strongest(values, torch.cat([self.places, places]).gather(0, chosen))

    def of(self, latent: int) -> list[tuple[float, int]]:
        """(activation, token) of one latent, strongest first."""
        pairs = zip(self.values[:, latent].tolist(), self.places[:, latent].tolist(), strict=True)
        return [(value, place) for value, place in pairs if place >= 0]


class Wording:
    """Remembers the kept tokens of a pass."""

    def __init__(self, context: Context) -> None:
        try:
            self._tokenizer = None if context.without_tokens else context.tokenizer
        except ModelMissing:
            self._tokenizer = None
        self._batches: list[Tensor] = []

    def read(self, batch: Windows) -> None:
        """The next batch of the pass."""
        self._batches.append(batch.tokens[batch.keep].cpu())

    def token(self, number: int) -> str:
        """A token's text."""
        token = int(self._tokens[number])
        if self._tokenizer is None:
            return f"<{token}>"
        return self._tokenizer.backend.decode([token], skip_special_tokens=False)

    @cached_property
    def _tokens(self) -> Tensor:
        """int64 [N]; asked for when the pass is over."""
        return torch.cat(self._batches)
