"""Sums into places given by an index; differentiable, and the same bits each time on every device."""

from __future__ import annotations

from torch import Tensor


def index_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """out[index[n]] += values[n]: [size]."""
    if values.device.type == "cpu":
        return values.new_zeros(size).index_add(0, index, values)
    # Atomics would add in another order each time; this sorts first.
    return values.new_zeros(size).index_put((index,), values, accumulate=True)
