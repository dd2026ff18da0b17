"""The strongest activations of each latent over a stream of tokens, kept as it goes by.

N tokens, F latents, K kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
