"""How often each latent fires on a text. W windows, T tokens, F latents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class FiringCounts:
    """Running counts over the batches of one text."""

    fired: Tensor  # int64 [F]
    tokens: int = 0

    @staticmethod
    def zeros(width: int, device: torch.device | str = "cpu") -> FiringCounts:
        return FiringCounts(torch.zeros(width, dtype=torch.int64, device=device))

    def add(self, acts_WTF: Tensor, keep_WT: Tensor) -> None:
        """Count a batch; special tokens (`keep` is false) count for nothing."""
        self.fired += ((acts_WTF > 0) & keep_WT[..., None]).sum((0, 1))
        self.tokens += int(keep_WT.sum())

    def shares(self) -> np.ndarray:
        """float64 [F]: the share of tokens on which each latent fires, to six decimals.

        The protocol passes these numbers through a text file with six decimals. That makes ties, and
        zeros of latents that fire less than once in two million tokens.
        """
        shares = (self.fired.to(torch.float32) / self.tokens).tolist()
        return np.array([float(f"{share:f}") for share in shares])
