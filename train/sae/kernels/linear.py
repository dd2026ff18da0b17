"""The dense product of an encoder, by the faster of two libraries.

In float32 on a processor torch calls MKL, which falls behind on those that its maker did not build; oneDNN
was faster where both were timed, and has to be asked for by name.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from ...parallel.sharded_rows import is_sharded


def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b for x [..., D] and W [F, D]; the gradient is torch's own."""
    if not _is_for_onednn(x, W):
        return functional.linear(x, W, b)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
    return result


def _is_for_onednn(x: Tensor, W: Tensor) -> bool:
    is_float32 = x.dtype == W.dtype == torch.float32 and x.device.type == W.device.type == "cpu"
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
    return is_float32 and not needs_gradient and not is_sharded(W) and x.numel() > 0 and has_onednn()


@lru_cache
def has_onednn() -> bool:
    """Whether this build of torch has the product under the name that its own compiler calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
