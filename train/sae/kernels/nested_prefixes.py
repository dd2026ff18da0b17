"""Squared errors of nested parts of a dictionary, with gradients, in one pass over the codes.

B rows, D width, M prefixes, N entries. The support is sorted by (prefix, row): its bag sums are the M contributions
[M, B, D], and running differences turn them into residuals in place. Gradients are gathered group by group, each from
one [B, D] slice, which stays in cache.
"""

# pyright: reportIncompatibleMethodOverride=false
# (`once_differentiable` makes ctx positional, which the stub of Function.backward does not foresee)

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...parallel.dictionary_over_processes import ALL_LATENTS, Latents
from .codes import Codes
from .dense_products import Product, dot
from .hardware import constants
from .row_gradients import table_gradient
from .sparse_products import column_sum, decode_sum, gathered, pair_dots
from .sparse_support import Support, group_offsets


class _NestedErrors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values_N: Tensor,
        W_FD: Tensor,
        b_D: Tensor,
        target_BD: Tensor,
        support: Support,
        prefixes: int,
        latents: Latents,
        product: Product,
    ) -> tuple[Tensor, Tensor]:
        rows, width = target_BD.shape
        residuals = latents.sum(decode_sum(support, values_N, W_FD).view(prefixes, rows, width))
        torch.sub(target_BD - b_D, residuals[0], out=residuals[0])
        for prefix in range(1, prefixes):
            torch.sub(residuals[prefix - 1], residuals[prefix], out=residuals[prefix])
        errors = torch.stack([dot(residual, residual) for residual in residuals]) / rows
        ctx.support, ctx.product = support, product
        ctx.save_for_backward(values_N, W_FD, residuals)
        ctx.mark_non_differentiable(last := residuals[-1])
        return errors, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        values_N, W_FD, residuals = ctx.saved_tensors
        prefixes, rows, width = residuals.shape
        scale = grad_M * (-2.0 / rows)
        grads = torch.empty_like(residuals)
        torch.mul(residuals[-1], scale[-1], out=grads[-1])
        for prefix in range(prefixes - 2, -1, -1):
            torch.mul(residuals[prefix], scale[prefix], out=grads[prefix]).add_(grads[prefix + 1])
        table = gathered(grads.view(prefixes * rows, width), ctx.product)
        grad_values = pair_dots(ctx.support, table, W_FD)
        return grad_values, table_gradient(W_FD, ctx.support, values_N, table), column_sum(grads[0]), *[None] * 5


def nested_errors(
    codes: Codes, W: Tensor, b: Tensor, target: Tensor, widths: tuple[int, ...], latents: Latents
) -> tuple[Tensor, Tensor]:
    """Mean over rows of the squared error of each prefix [M], and the residual of the last one [B, D].

    Sparse codes may be those of only this process's latents: the reconstructions of all processes are summed.
    """
    if codes.support is None:
        assert latents.is_whole
        return _dense_errors(codes.values, W, b, target, widths)
    last = constants(widths, codes.support.latents)
    prefix_N = torch.bucketize(codes.support.latents + latents.first, last, right=True)
    return group_errors(codes, W, b, target, prefix_N, len(widths), latents)


class Tiering:
    """The latents of each tier, as the host needs them. Made once, because a GPU must be waited for."""

    def __init__(self, tier_F: Tensor, num_tiers: int) -> None:
        self.tier = tier_F
        self.members = tuple((tier_F == tier).nonzero().view(-1) for tier in range(num_tiers))  # ascending
        self.widths = tuple(accumulate(len(members) for members in self.members))
        self.order = None if bool((tier_F.diff() >= 0).all()) else torch.argsort(tier_F, stable=True)


def tier_errors(codes: Codes, W: Tensor, b: Tensor, target: Tensor, tiering: Tiering) -> tuple[Tensor, Tensor]:
    """The same for nested sets of latents: set t holds the latents of tiers 0 to t, in any order."""
    widths, order = tiering.widths, tiering.order
    if codes.support is not None:
        return group_errors(codes, W, b, target, tiering.tier[codes.support.latents], len(widths))
    if order is None:
        return _dense_errors(codes.values, W, b, target, widths)
    return _dense_errors(codes.values[:, order], W[order], b, target, widths)


def group_errors(
    codes: Codes,
    W: Tensor,
    b: Tensor,
    target: Tensor,
    prefix_N: Tensor,
    prefixes: int,
    latents: Latents = ALL_LATENTS,
) -> tuple[Tensor, Tensor]:
    """The same for sparse codes whose entries are each in one of `prefixes` groups: set m holds groups 0 to m."""
    assert codes.support is not None
    support = codes.support
    groups, order = torch.sort(prefix_N * support.num_rows + support.rows, stable=True)  # by (prefix, row)
    offsets = group_offsets(groups, prefixes * support.num_rows)
    grouped, values = Support(offsets, support.latents[order], support.num_latents), codes.values[order]
    return _NestedErrors.apply(values, W, b, target, grouped, prefixes, latents, codes.product)


def _dense_errors(acts: Tensor, W: Tensor, b: Tensor, target: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    residual, start, errors = target - b, 0, []
    for stop in widths:
        residual = residual - acts[:, start:stop] @ W[start:stop]
        errors.append(residual.square().sum() / residual.shape[0])
        start = stop
    return torch.stack(errors), residual.detach()
