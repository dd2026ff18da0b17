"""The straight-through derivatives of a learned threshold (Rajamanoharan et al. 2024, JumpReLU).

There is a rectangular window of width `bandwidth` around theta. jump(z, theta) = z where z > theta, else 0; inside the
window its derivative by theta is -theta / bandwidth. heaviside(z, theta) = 1 where z > theta, else 0; inside the
window its derivative by theta is -1 / bandwidth. Neither passes a gradient of the window on to z.
"""

# pyright: reportIncompatibleMethodOverride=false
# (`once_differentiable` makes ctx positional, which the stub of Function.backward does not foresee)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return torch.where(z > theta, z, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, theta = ctx.saved_tensors
        grad_theta = torch.where(_in_window(z, theta, ctx.bandwidth), grad * theta, 0.0) / -ctx.bandwidth
        return torch.where(z > theta, grad, 0.0), grad_theta.sum_to_size(theta.shape), None


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return (z > theta).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        z, theta = ctx.saved_tensors
        grad_theta = torch.where(_in_window(z, theta, ctx.bandwidth), grad, 0.0) / -ctx.bandwidth
        return None, grad_theta.sum_to_size(theta.shape), None


def _in_window(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    return (z - theta).abs() < 0.5 * bandwidth


def jump_ste(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """z where it exceeds theta, with the straight-through derivative by theta."""
    return _Jump.apply(z, theta, bandwidth)


def heaviside_ste(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """1 where z exceeds theta, with the straight-through derivative by theta."""
    return _Heaviside.apply(z, theta, bandwidth)
