"""Moments of one layer's residuals: per shard, and merged so that the order of work does not matter.

Each shard keeps its own moments in float64; a store's moments are always merged in shard order, so that any number
of workers in any order gives the same bits. Means are merged pairwise by count (Chan, Golub and LeVeque), never by
adding up large sums.

`count`, `mean`, `mean_square_norm` leave out special tokens (BOS, padding and the like: their residuals are outliers
that are never trained on); `norm_by_position` is over all tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .errors import ShardCorrupt
from .layout import MOMENT_SCALARS
from .stored_dtypes import to_float32


@dataclass(frozen=True)
class Moments:
    """Moments over some windows of one layer. D residual width, T context."""

    count: int  # tokens that are not special
    mean: np.ndarray  # float64 [D]
    mean_norm: float  # mean of ||x||
    mean_square_norm: float  # mean of ||x||^2
    windows: int  # that norm_by_position averages over
    norm_by_position: np.ndarray  # float64 [T], mean of ||x|| at each position, special tokens included

    @property
    def rms_norm(self) -> float:
        return float(np.sqrt(self.mean_square_norm))

    @property
    def total_variance(self) -> float:
        """E||x - mean||^2, the denominator of explained variance."""
        return float(self.mean_square_norm - self.mean @ self.mean)


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together; `parts` must come in shard order."""
    iterator = iter(parts)
    total = next(iterator, None)
    if total is None:
        raise ValueError("expected the moments of at least one shard, found none")
    for part in iterator:
        total = _merge_two(total, part)
    return total


def _merge_two(a: Moments, b: Moments) -> Moments:
    count, windows = a.count + b.count, a.windows + b.windows
    share = b.count / count if count else 0.0
    window_share = b.windows / windows if windows else 0.0
    return Moments(
        count=count,
        mean=a.mean + (b.mean - a.mean) * share,
        mean_norm=a.mean_norm + (b.mean_norm - a.mean_norm) * share,
        mean_square_norm=a.mean_square_norm + (b.mean_square_norm - a.mean_square_norm) * share,
        windows=windows,
        norm_by_position=a.norm_by_position + (b.norm_by_position - a.norm_by_position) * window_share,
    )


def measure(resid_WTD: np.ndarray, is_special_WT: np.ndarray, dtype: str | None = None) -> Moments:
    """The moments of residuals [W, T, D], given as floats or as stored in `dtype`; converted window by window."""
    windows, context, width = resid_WTD.shape
    total = np.zeros(width)
    norms = np.empty((windows, context))
    for window in range(windows):
        values = resid_WTD[window]
        resid = (to_float32(values, dtype) if dtype else values).astype(np.float64)
        norms[window] = np.sqrt(np.einsum("td,td->t", resid, resid))
        total += resid[~is_special_WT[window]].sum(axis=0)
    kept = norms[~is_special_WT]
    count = len(kept)
    return Moments(
        count=count,
        mean=total / max(count, 1),
        mean_norm=float(kept.mean()) if count else 0.0,
        mean_square_norm=float(np.square(kept).mean()) if count else 0.0,
        windows=windows,
        norm_by_position=norms.mean(axis=0),
    )


def is_special(tokens: np.ndarray, special_tokens: Iterable[int]) -> np.ndarray:
    """bool, like `tokens`: which of them are special."""
    return np.isin(tokens, np.fromiter(special_tokens, dtype=tokens.dtype))


def to_line(moments: Moments) -> np.ndarray:
    """float64 [4 + T + D]: the moments as they are stored, see `layout.moment_columns`."""
    scalars = [getattr(moments, name) for name in MOMENT_SCALARS]
    return np.concatenate([np.array(scalars, np.float64), moments.norm_by_position, moments.mean])


def from_line(line: np.ndarray, context: int) -> Moments:
    count, mean_norm, mean_square_norm, windows = line[: len(MOMENT_SCALARS)]
    if not all(number >= 0 and number.is_integer() for number in (count, windows)):  # false for NaN
        raise ShardCorrupt(f"expected whole numbers of tokens and of windows, found {count} and {windows}")
    rest = line[len(MOMENT_SCALARS) :]
    return Moments(
        count=int(count),
        mean=rest[context:],
        mean_norm=float(mean_norm),
        mean_square_norm=float(mean_square_norm),
        windows=int(windows),
        norm_by_position=rest[:context],
    )
