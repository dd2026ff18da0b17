"""The sparse products with gradients; which pairs a support holds has no gradient.

Every backward pass costs k / F of the dense one. Gradients equal autograd's for the dense formula, except that with
the encoder's product in bfloat16 a GPU's kernels gather the batch's rows for them in bfloat16, half the bytes.
"""

# pyright: reportIncompatibleMethodOverride=false
# (`once_differentiable` makes ctx positional, which the stub of Function.backward does not foresee)

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dense_products import Product, dot, linear, matrix_units, multiply
from .row_gradients import low_copy, table_gradient
from .sparse_products import column_sum, decode_sum, gathered, latent_sum, pair_dots, row_sum
from .sparse_support import Support, index_sum

Change = Callable[[Tensor], Tensor]


class _Affine(torch.autograd.Function):
    """x W^T + b at the pairs of a support, or everywhere without one; x was centred by `center`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        center_D: Tensor | None,
        W_FD: Tensor,
        b_F: Tensor,
        support: Support | None,
        known: Tensor | None,
        product: Product,
    ) -> Tensor:
        ctx.support, ctx.product = support, product
        ctx.save_for_backward(x_BD, W_FD)
        if known is not None:
            return known
        if support is not None:
            return pair_dots(support, x_BD, W_FD).add_(b_F[support.latents])
        if product == "bfloat16":
            return multiply(x_BD, low_copy(W_FD).t(), product).add_(b_F)
        with matrix_units(product):
            return linear(x_BD, W_FD, b_F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, W_FD = ctx.saved_tensors
        support, product = ctx.support, ctx.product
        need_x, need_center, need_W = ctx.needs_input_grad[:3]
        if support is None:
            grad_x = multiply(grad, _factor(W_FD, product), product) if need_x else None
            grad_W = multiply(grad.t(), x_BD, product) if need_W else None
            grad_b = grad.sum(0)
        else:
            grad_x = decode_sum(support, grad, W_FD) if need_x else None
            grad_W = table_gradient(W_FD, support, grad, gathered(x_BD, product)) if need_W else None
            grad_b = latent_sum(support, grad)
        # Summed over rows before the product: one vector times W instead of a bag sum.
        grad_center = -(grad_b @ W_FD) if need_center else None
        return grad_x, grad_center, grad_W, grad_b, None, None, None


class _Decode(torch.autograd.Function):
    """values W, plus a bias, at the pairs of a support, or everywhere without one."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W_FD: Tensor, b_D: Tensor | None, support: Support | None, product: Product
    ) -> Tensor:
        ctx.support, ctx.product = support, product
        ctx.save_for_backward(values, W_FD)
        if support is None:
            decoded = multiply(values, _factor(W_FD, product), product)
        else:
            decoded = decode_sum(support, values, W_FD)
        return decoded if b_D is None else decoded.add_(b_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        values, W_FD = ctx.saved_tensors
        support, product = ctx.support, ctx.product
        need_values, need_W, need_b = ctx.needs_input_grad[:3]
        if support is None:
            grad_values = multiply(grad_BD, _factor(W_FD, product).t(), product) if need_values else None
            grad_W = multiply(values.t(), grad_BD, product) if need_W else None
        else:
            grad_BD = grad_BD.contiguous()
            read_BD = gathered(grad_BD, product)
            grad_values = pair_dots(support, read_BD, W_FD) if need_values else None
            grad_W = table_gradient(W_FD, support, values, read_BD) if need_W else None
        return grad_values, grad_W, column_sum(grad_BD) if need_b else None, None, None


class _Linear(torch.autograd.Function):
    """A linear map with its own backward pass: torch's, of table[index], adds in a different order each time if threads
    share many entries."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, change: Change, back: Change) -> Tensor:
        ctx.back = back
        return change(given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_hat_BD: Tensor, residual_BD: Tensor) -> Tensor:
        ctx.save_for_backward(residual_BD)
        return dot(residual_BD, residual_BD) / residual_BD.shape[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (residual_BD,) = ctx.saved_tensors
        return residual_BD * (grad * (-2.0 / residual_BD.shape[0])), None


def affine(
    x: Tensor,
    center: Tensor | None,
    W: Tensor,
    b: Tensor,
    support: Support | None,
    known: Tensor | None = None,
    product: Product = "float32",
) -> Tensor:
    """Pre-activations x W^T + b at the support, or everywhere without one.

    x is already centred; `center` only receives the gradient that x would pass on to it. `known` is the result if the
    caller already has it. Without a support, `product` is the precision of the dense products; with one, only that of
    rows for the gradients.
    """
    return _Affine.apply(x, center, W, b, support, known, product)


def decode_at(values: Tensor, W: Tensor, b: Tensor | None, support: Support, product: Product = "float32") -> Tensor:
    """Sum of decoder rows weighted by `values` [N], plus a bias: [B, D]. `product` as in `affine`."""
    return _Decode.apply(values, W, b, support, product)


def decode_dense(values: Tensor, W: Tensor, b: Tensor | None, product: Product) -> Tensor:
    """values @ W + b for dense values [B, F]: [B, D]."""
    if product == "float32":
        return values @ W if b is None else torch.addmm(b, values, W)
    decoded: Tensor = _Decode.apply(values, W, None, None, product)
    return decoded if b is None else decoded + b


def _factor(W: Tensor, product: Product) -> Tensor:
    return low_copy(W) if product == "bfloat16" else W


def spread_latents(vector: Tensor, support: Support) -> Tensor:
    """vector[latent] for every pair of the support: [N]."""
    return _Linear.apply(vector, lambda vector: vector[support.latents], partial(latent_sum, support))


def spread_rows(vector: Tensor, support: Support) -> Tensor:
    """vector[row] for every pair of the support: [N]."""
    return _Linear.apply(vector, lambda vector: vector[support.rows], partial(row_sum, support))


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """table[index], where rows may be repeated: [*index.shape, ...]."""
    size = len(table)
    return _Linear.apply(table, lambda table: table[index], lambda grad: index_sum(grad, index, size))


def sum_rows(values: Tensor, support: Support) -> Tensor:
    """Each row's sum of the values [N] at the support: [B]."""
    return _Linear.apply(values, partial(row_sum, support), lambda grad: grad[support.rows])


def squared_error(x_hat: Tensor, residual: Tensor) -> Tensor:
    """Mean over rows of ||residual||^2, where `residual` = target - x_hat is known and the target constant."""
    return _SquaredError.apply(x_hat, residual.detach())
