"""Products of 16-bit models on processors without instructions for them: in float32, rounded once.

On these, torch's own 16-bit layers and attention take many times as long as in float32 (docs/performance.md). Other
processors' instructions sum in float32 too, so only the order of summation differs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional


def widen_products(model: nn.Module) -> None:
    """Replace a model's layers by widened ones where that is faster; weights are unchanged."""
    for module in model.modules():
        is_linear, is_conv1d = type(module) is nn.Linear, type(module).__name__ == "Conv1D"
        if (is_linear or is_conv1d) and is_widened(module.weight.device.type, module.weight.dtype):
            module.__class__ = WidenedLinear if is_linear else WidenedConv1D


class WidenedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class WidenedConv1D(nn.Module):
    """transformers' Conv1D, as in GPT-2: a linear layer with a transposed weight."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return conv1d(x, self.weight, self.bias)


def linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x W^T + b."""
    if not is_widened(x.device.type, x.dtype):
        return functional.linear(x, W, b)
    return functional.linear(x.float(), W.float(), None if b is None else b.float()).to(x.dtype)


def conv1d(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """x W + b, as transformers computes it."""
    if is_widened(x.device.type, x.dtype):
        return linear(x, W.t(), b)
    return torch.addmm(b, x.view(-1, x.size(-1)), W).view(*x.shape[:-1], -1)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b."""
    return (a.float() @ b.float()).to(a.dtype) if is_widened(a.device.type, a.dtype) else a @ b


@lru_cache
def is_widened(device_type: str, dtype: torch.dtype) -> bool:
    """Whether products of this type are computed in float32: only on x86, as torch detects nothing on others."""
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or not torch.cpu._is_avx2_supported():
        return False
    if dtype == torch.float16:
        return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
