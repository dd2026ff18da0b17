"""Moments of a residual stream, as float64 sums that add up exactly enough in any grouping.

Means over channels leave out special tokens, whose residuals are of another size (the first token of a window
is an attention sink); norms by position are over all tokens, which is where that shows.

Shape suffixes: W windows, T positions, D channels.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import NonFiniteResidual

BLOCK_TOKENS = 1024  # converted to float64 at a time: small enough to stay in a CPU's cache


@dataclass(frozen=True)
class MomentSums:
    """Sums over the tokens of some windows in one layer; on the host, ready to be added in shard order."""

    count: int
    """Tokens that are not special; the sums over channels and norms are over these."""
    resid: np.ndarray
    """[D]"""
    norm: float
    square_norm: float
    windows: int
    norm_by_position: np.ndarray
    """[T], over all tokens of the windows."""

    def __add__(self, other: "MomentSums") -> "MomentSums":
        return MomentSums(
            count=self.count + other.count,
            resid=self.resid + other.resid,
            norm=self.norm + other.norm,
            square_norm=self.square_norm + other.square_norm,
            windows=self.windows + other.windows,
            norm_by_position=self.norm_by_position + other.norm_by_position,
        )


def is_special(ids_WT: Tensor, special_tokens: Collection[int]) -> Tensor:
    """Which tokens are special."""
    return torch.isin(ids_WT, torch.tensor(sorted(special_tokens), dtype=ids_WT.dtype, device=ids_WT.device))


def sum_moments(layer: int, resid_WTD: Tensor, is_special_WT: Tensor) -> MomentSums:
    """Sums over a batch of windows; stops at infinities and NaN, in special tokens too."""
    counted_WT = (~is_special_WT).double()
    norm_WT = resid_WTD.new_empty(resid_WTD.shape[:2], dtype=torch.float64)
    resid_D = resid_WTD.new_zeros(resid_WTD.shape[-1], dtype=torch.float64)
    size = max(1, BLOCK_TOKENS // resid_WTD.shape[1])
    for start in range(0, len(resid_WTD), size):
        block = slice(start, start + size)
        resid64 = resid_WTD[block].double()
        norm_WT[block] = torch.linalg.vector_norm(resid64, dim=-1)
        resid_D += counted_WT[block].flatten() @ resid64.flatten(0, 1)
    _validate_finite(layer, norm_WT, resid_WTD.dtype)
    return MomentSums(
        count=int(counted_WT.sum()),
        resid=resid_D.cpu().numpy(),
        norm=float((norm_WT * counted_WT).sum()),
        square_norm=float((norm_WT.square() * counted_WT).sum()),
        windows=len(resid_WTD),
        norm_by_position=norm_WT.sum(0).cpu().numpy(),
    )


def _validate_finite(layer: int, norm_WT: Tensor, dtype: torch.dtype) -> None:
    """A norm in float64 is finite if and only if every channel is."""
    if not torch.isfinite(norm_WT).all():
        window, position = torch.nonzero(~torch.isfinite(norm_WT))[0].tolist()
        raise NonFiniteResidual(
            f"layer {layer}: the residual at window {window} of the batch, position {position}, holds infinities "
            f"or NaN; the model overflows in {dtype}, harvest with --dtype bfloat16 or float32"
        )
