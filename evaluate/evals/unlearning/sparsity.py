"""How often each latent fires on a text. W windows, T tokens, F latents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...model.sums import Sums


@dataclass(frozen=True, eq=False)
class FiringCounts(Sums):
    """Over some batches of a text."""

    fired: Tensor  # int64 [F]
    tokens: int

    @staticmethod
    def of(acts_WTF: Tensor, keep_WT: Tensor) -> FiringCounts:
        """Those of a batch; special tokens (`keep` is false) count for nothing."""
        return FiringCounts(((acts_WTF > 0) & keep_WT[..., None]).sum((0, 1)), int(keep_WT.sum()))

    def shares(self) -> np.ndarray:
        """float64 [F]: the share of tokens on which each latent fires, to six decimals.

        The protocol passes these numbers through a text file with six decimals. That makes ties, and
        zeros of latents that fire less than once in two million tokens.
        """
        shares = (self.fired.to(torch.float32) / self.tokens).tolist()
        return np.array([float(f"{share:f}") for share in shares])
