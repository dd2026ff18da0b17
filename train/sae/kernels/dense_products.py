"""Dense products: in float32 with the faster of two libraries, or at the rate of a GPU's matrix units.

In float32 on a CPU torch calls MKL, which is slow on CPUs that Intel did not make; oneDNN was faster wherever both
were timed, but must be called explicitly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, reduce
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .hardware import has_fast_bfloat16

Product = Literal["float32", "tf32", "bfloat16"]  # the precision of the factors; sums are in float32
CPU_DOT, GPU_DOT = 1 << 20, 1 << 30  # numbers summed by one call: see `dot`


def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b for x [..., D] and W [F, D]; the gradient is torch's own."""
    return _by_onednn(x, W, b) if _is_for_onednn(x, W) else functional.linear(x, W, b)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a * b over all numbers, without gradient. Piece by piece: a GPU's library counts them in 32 bits, and
    a CPU's keeps few float32 sums, to which small squares are lost (of 2^27 in one call 0.8 %)."""
    most = CPU_DOT if a.device.type == "cpu" else GPU_DOT
    pieces = zip(a.reshape(-1).split(most), b.reshape(-1).split(most), strict=True)
    return reduce(torch.add, (torch.dot(*piece) for piece in pieces))


def packed(W: Tensor) -> Tensor:
    """A bfloat16 W on a CPU in the layout for `linear_packed`, converted once instead of at each product."""
    if not has_onednn() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return W
    return torch.ops.mkldnn._reorder_linear_weight(W, None)


def linear_packed(x: Tensor, packed_W: Tensor, b: Tensor) -> Tensor:
    """x W^T + b in the type of all three, without gradient."""
    return _by_onednn(x, packed_W, b) if packed_W.is_mkldnn else functional.linear(x, packed_W, b)


def _by_onednn(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")


def _is_for_onednn(x: Tensor, W: Tensor) -> bool:
    is_float32 = x.dtype == W.dtype == torch.float32 and x.device.type == W.device.type == "cpu"
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
    return is_float32 and not needs_gradient and x.numel() > 0 and W.numel() > 0 and has_onednn()


@lru_cache
def has_onednn() -> bool:
    """Whether this build of torch has the product under the names that its own compiler uses."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def product_on(device: torch.device, wanted: Product) -> Product:
    """The requested precision if the hardware supports it, otherwise float32."""
    if wanted == "bfloat16":
        return wanted if has_fast_bfloat16(device.type) else "float32"
    return wanted if device.type == "cuda" else "float32"


def multiply(a: Tensor, b: Tensor, product: Product) -> Tensor:
    """a @ b without gradient, in the type of `a`; `product` comes from `product_on`."""
    if product == "bfloat16":
        return _low_product(a.to(torch.bfloat16), b.to(torch.bfloat16)).to(a.dtype)
    with matrix_units(product):
        return a @ b


@contextmanager
def matrix_units(product: Product) -> Iterator[None]:
    """A context in which float32 products may round their factors to TF32, if `product` is that."""
    if product != "tf32":
        yield
        return
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _low_product(a: Tensor, b: Tensor) -> Tensor:
    """A GPU can return the float32 sums; elsewhere they are rounded to bfloat16 on return."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else torch.mm(a, b)
