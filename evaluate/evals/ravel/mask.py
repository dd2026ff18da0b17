"""The mask of latents that carry an attribute, learned by gradient (MDBM). B pairs, F latents, D width, V vocabulary.

The base's codes are mixed with the source's: (1 - m) f_base + m f_source, m = sigmoid(mask / T). T falls on a log
scale from 1 to 1e-4, so that soft mixing becomes a choice; afterwards a latent is swapped where its mask is above
zero. The mixed codes are decoded in place of the residual: the SAE's error is not added back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

FIRST_TEMPERATURE, LAST_TEMPERATURE = 1.0, 1e-4


@dataclass(frozen=True, eq=False)
class Swap:
    """Codes at the entities of a batch of pairs, and the token that each is to bring about."""

    base: Tensor  # [B, F]
    source: Tensor  # [B, F]
    targets: Tensor  # int64 [B]


def temperatures(steps: int, dtype: torch.dtype) -> list[float]:
    """One for each step; rounded to the model's dtype, as SAEBench does."""
    first, last = (math.log10(value) for value in (FIRST_TEMPERATURE, LAST_TEMPERATURE))
    return torch.logspace(first, last, steps, dtype=dtype).tolist()


def mixed(base_BF: Tensor, source_BF: Tensor, share_F: Tensor) -> Tensor:
    """Codes with a share of the source's in each latent."""
    return (1 - share_F) * base_BF + share_F * source_BF


class LatentMask:
    """The mask of one SAE and one attribute while it is learned, and then for good."""

    def __init__(self, width: int, lr: float, device: torch.device | str = "cpu") -> None:
        self.values = torch.zeros(width, device=device, requires_grad=True)
        self._optimizer = torch.optim.Adam([self.values], lr=lr)

    def step(self, swap: Swap, temperature: float, predict: Callable[[Tensor], Tensor]) -> float:
        """One step on a batch; `predict` maps mixed codes [B, F] to logits [B, V]. Returns the loss."""
        with torch.enable_grad():
            share_F = torch.sigmoid(self.values / temperature)
            logits_BV = predict(mixed(swap.base, swap.source, share_F))
            loss = functional.cross_entropy(logits_BV.float(), swap.targets)
            self._optimizer.zero_grad()
            loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    def chosen(self) -> Tensor:
        """float [F], 1 for latents that are swapped."""
        return (self.values.detach() > 0).to(self.values.dtype)
