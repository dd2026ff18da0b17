"""Moments of a batch of residuals, computed where the residuals are; `cache_schema.moments` merges them.

Everything is accumulated in float64. Means leave out special tokens (a window's first token is an attention sink,
with a residual of another magnitude); norms by position are over all tokens.

Shape suffixes: W windows, T positions, D channels.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..cache_schema import Moments
from ..cache_schema.sites import RESID
from .errors import NonFiniteResidual, name_window, say_overflow

SUMMED_BY_ONE_THREAD = 32_768  # the most numbers that torch sums in one thread
BLOCK_TOKENS = 1024  # converted to float64 at a time: small enough to stay in a CPU's cache


def is_special(ids_WT: Tensor, special_tokens: Collection[int]) -> Tensor:
    """Which tokens are special."""
    return torch.isin(ids_WT, torch.tensor(sorted(special_tokens), dtype=ids_WT.dtype, device=ids_WT.device))


def measure(
    layer: int, resid_WTD: Tensor, is_special_WT: Tensor, hook: str = RESID, first: int | None = None
) -> Moments:
    """Moments over a batch whose first window is the store's window `first`. Raises on any infinity or NaN."""
    counted_WT = (~is_special_WT).double()
    norm_WT, sum_D = _norms_and_sum(resid_WTD, counted_WT)
    _validate_finite(layer, hook, norm_WT, resid_WTD.dtype, first)
    count = int(counted_WT.sum())
    return Moments(
        count=count,
        mean=(sum_D / max(count, 1)).cpu().numpy(),
        mean_norm=_sum(norm_WT * counted_WT) / max(count, 1),
        mean_square_norm=_sum(norm_WT.square() * counted_WT) / max(count, 1),
        windows=len(resid_WTD),
        norm_by_position=norm_WT.mean(0).cpu().numpy(),
    )


def _sum(values_WT: Tensor) -> float:
    """A sum to the same bits on any number of threads: they split a sum over all numbers, but not one per window."""
    return float(values_WT.sum() if values_WT.numel() <= SUMMED_BY_ONE_THREAD else values_WT.sum(1).sum())


def _norms_and_sum(resid_WTD: Tensor, counted_WT: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of every token, and the sum over counted tokens; converted a few windows at a time."""
    windows, context, d_model = resid_WTD.shape
    norm_WT = counted_WT.new_empty(windows, context)
    sum_D = counted_WT.new_zeros(d_model)
    size = max(1, BLOCK_TOKENS // context)
    for start in range(0, windows, size):
        block = slice(start, start + size)
        resid64 = resid_WTD[block].double()
        norm_WT[block] = torch.linalg.vector_norm(resid64, dim=-1)
        sum_D += counted_WT[block].flatten() @ resid64.flatten(0, 1)
    return norm_WT, sum_D


def _validate_finite(layer: int, hook: str, norm_WT: Tensor, dtype: torch.dtype, first: int | None) -> None:
    """Refuse non-finite residuals: a norm in float64 is finite if and only if every channel is."""
    if not torch.isfinite(norm_WT).all():
        window, position = torch.nonzero(~torch.isfinite(norm_WT))[0].tolist()
        name, what = str(dtype).removeprefix("torch."), "residual" if hook == RESID else hook
        raise NonFiniteResidual(
            f"layer {layer}: the {what} at {name_window(window, first)}, position {position}, holds infinities "
            f"or NaN; {say_overflow(name)}"
        )
