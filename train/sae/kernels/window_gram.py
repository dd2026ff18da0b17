"""Dot products of codes with all codes of the same window, without ever making sparse codes dense.

B rows, W windows, T context, F latents, N entries. Two tokens of a window have a product only through latents that both
use. Entries are grouped by (window, latent); groups of one contribute to no pair.
1. Each group becomes a table row [T]: the latent's values over the window.
2. gram[i] = sum over the entries of row i of value * table[group]: a bag sum.
3. The gradient for an entry is the dot of gram's gradient, made symmetric, with the same table row.
Both cost N * T; the products of dense codes would cost B * T * F.
"""

# pyright: reportIncompatibleMethodOverride=false
# (`once_differentiable` makes ctx positional, which the stub of Function.backward does not foresee)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...errors import ConfigInvalid
from .codes import Codes
from .hardware import reads_at_once
from .sparse_products import decode_sum, pair_dots, row_sum
from .sparse_support import Support, starts


@dataclass(frozen=True, eq=False)
class Places:
    """Where the rows of a batch are in their windows; rows of a window are contiguous, in order of position."""

    window: Tensor  # int64 [B]
    position: Tensor  # int64 [B]
    row_of: Tensor  # int64 [W, T], -1 where there is no row

    def spread(self, table_BT: Tensor) -> Tensor:
        """[W, T, ...], zeros where there is no row."""
        spread = table_BT.new_zeros(*self.row_of.shape, *table_BT.shape[1:])
        spread[self.window, self.position] = table_BT
        return spread

    def collect(self, table_WT: Tensor) -> Tensor:
        """[B, ...]: the inverse of `spread`."""
        return table_WT[self.window, self.position]


def other_window(window: Tensor, position: Tensor, windows: int, setting: str) -> Tensor:
    """Another window for each position, never its own; neighbouring positions get different ones.

    The order of windows is random in each batch, so the shift need not be: the SAE's random numbers stay those of a run
    without the control.
    """
    if windows < 2:
        raise ConfigInvalid(
            f"{setting}: expected at least two windows in a batch to exchange rows, found 1: "
            "set a larger data.batch_tokens"
        )
    return (window + 1 + position % (windows - 1)) % windows


def window_gram(codes: Codes, places: Places) -> Tensor:
    """[B, T]: <f_i, f_j> for the token j at each position of i's window; zero where there is no row."""
    if codes.support is None:
        return _DenseGram.apply(codes.values, places)
    return _SparseGram.apply(codes.values, codes.support, places)


@dataclass(frozen=True, eq=False)
class _Groups:
    """The M entries of a support whose latent is also used by another token of the window."""

    chosen: Tensor  # int64 [M], places of the entries in the support
    support: Support  # rows against groups

    def table(self, values: Tensor, places: Places) -> Tensor:
        """[groups, T]: values over the window."""
        table = values.new_zeros(self.support.num_latents, places.row_of.shape[1])
        table[self.support.latents.long(), places.position[self.support.rows.long()]] = values[self.chosen]
        return table


class _SparseGram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_N: Tensor, support: Support, places: Places) -> Tensor:
        groups = _group(support, places.window)
        table = groups.table(values_N, places)
        gram = decode_sum(groups.support, values_N[groups.chosen], table)
        gram[torch.arange(len(gram), device=gram.device), places.position] = row_sum(support, values_N.square())
        ctx.support, ctx.places, ctx.groups = support, places, groups
        ctx.save_for_backward(values_N, table)
        return gram

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None, None]:
        values_N, table = ctx.saved_tensors
        groups, places = ctx.groups, ctx.places
        both = _symmetric(grad_BT, places)
        squares = both[torch.arange(len(both), device=both.device), places.position]
        grad = values_N * squares[ctx.support.rows]
        grad[groups.chosen] = pair_dots(groups.support, both, table)
        return grad, None, None


class _DenseGram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_BF: Tensor, places: Places) -> Tensor:
        ctx.places = places
        ctx.save_for_backward(values_BF)
        spread = places.spread(values_BF)
        return places.collect(spread @ spread.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None]:
        (values_BF,) = ctx.saved_tensors
        places = ctx.places
        both = places.spread(_symmetric(grad_BT, places))
        return places.collect(both @ places.spread(values_BF)), None


def _symmetric(grad_BT: Tensor, places: Places) -> Tensor:
    """[B, T]: the sum of the gradients of (i, j) and (j, i); twice that of (i, i)."""
    spread = places.spread(grad_BT)
    return places.collect(spread + spread.transpose(1, 2))


def _group(support: Support, window: Tensor) -> _Groups:
    """Group entries; ordered by latent, then by row, those of a group are contiguous.

    On a GPU, where the host would wait for the number of groups, there are as many groups as entries, including groups
    of one: their contribution is correct, though already known.
    """
    turned = support.by_latent
    of_window = window[turned.rows]
    begins = torch.ones_like(of_window, dtype=torch.bool)
    begins[1:] = (turned.latents[1:] != turned.latents[:-1]) | (of_window[1:] != of_window[:-1])
    run = begins.cumsum(0) - 1
    if not reads_at_once(run):
        group = torch.empty_like(run).index_copy_(0, turned.order, run).to(torch.int32)
        return _Groups(torch.arange(len(run), device=run.device), Support(support.offsets, group, len(run)))
    is_shared = torch.bincount(run) > 1
    number = is_shared.cumsum(0) - 1
    group = torch.full_like(run, -1)
    group[turned.order] = torch.where(is_shared[run], number[run], -1)
    chosen = (group >= 0).nonzero().view(-1)
    offsets = starts(torch.bincount(support.rows[chosen], minlength=support.num_rows))
    return _Groups(chosen, Support(offsets, group[chosen].to(torch.int32), int(is_shared.sum())))
