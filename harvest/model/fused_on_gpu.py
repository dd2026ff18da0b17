"""RMS norms, gates of MLPs and attention probabilities of 16-bit models on a GPU, each in one pass over memory.

A model's own RMS norm passes over its input about ten times, and eager attention as often over its scores. By count of
bytes that takes half as long as a layer's products, or at a long context as long (docs/performance.md). The kernels
round where the model does; sums, roots and exponentials in between may differ in the last digits of float32. They are
first compared with torch's operations on random numbers. If their results differ, or Triton is not there, the model's
own operations run.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...cache_schema.numbers_in_words import first_line
from .architectures import Norm

if TYPE_CHECKING:
    from .triton_kernels import Gate

SERVED = {"cuda"}  # device types whose tensors go to the kernels; a test that interprets them adds the CPU
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
WIDEST_ROW = 16384  # one program holds a row in registers
GATES: dict[str, Gate] = {"SiLUActivation": "silu", "GELUTanh": "gelu tanh"}  # transformers' modules
Forward = Callable[[Tensor], Tensor]
Fused = tuple[Forward, Callable[[], Tensor]]  # a module's forward pass by a kernel, and an input to compare it on
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}  # of a norm: a few roundings


def fuse(model: nn.Module, norm: Norm) -> None:
    """Let kernels compute a model's RMS norms and gated MLPs where they serve them; weights and hooks are unchanged."""
    agrees: dict[type, bool] = {}
    for module in model.modules():
        kind = type(module)
        found = _fused_norm(module, norm) or _fused_mlp(module)
        if found is None:
            continue
        fused, draw = found
        if kind not in agrees:
            agrees[kind] = _agrees(kind.__name__, partial(kind.forward, module), fused, draw())
        if agrees[kind]:
            module.forward = fused


def _fused_norm(module: Any, norm: Norm) -> Fused | None:
    if norm == "layer" or not type(module).__name__.endswith("RMSNorm"):
        return None
    weight: Tensor = module.weight
    epsilon = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    if epsilon is None or not is_served(weight.device, weight.dtype) or len(weight) > WIDEST_ROW:
        return None

    def fused(x: Tensor) -> Tensor:
        if not _serves(x, module.weight):
            return type(module).forward(module, x)
        from .triton_kernels import norm as kernel

        return kernel(x, module.weight, epsilon, norm == "rms from one")

    return fused, partial(_rows_for_norm, weight, epsilon)


def _fused_mlp(module: Any) -> Fused | None:
    activation = GATES.get(type(getattr(module, "act_fn", None)).__name__)
    if activation is None or not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
        return None
    weight: Tensor = module.gate_proj.weight
    if not is_served(weight.device, weight.dtype):
        return None

    def fused(x: Tensor) -> Tensor:
        if not _serves(x, module.gate_proj.weight):
            return type(module).forward(module, x)
        from .triton_kernels import gated

        return module.down_proj(gated(module.gate_proj(x), module.up_proj(x), activation))

    return fused, partial(_drawn, weight, 4, weight.shape[1])


def _serves(x: Tensor, weight: Tensor) -> bool:
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return not learns and x.dtype == weight.dtype and is_served(x.device, x.dtype)


def serves_scores(scores: Tensor) -> bool:
    """Whether `probabilities_` serves these scores [..., T]."""
    return (
        is_served(scores.device, scores.dtype)
        and not scores.requires_grad
        and scores.shape[-1] <= WIDEST_ROW
        and scores.is_contiguous()
    )


def probabilities_(scores_WHQT: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
    """Attention scores to probabilities, in place: scaled, capped, masked, softmax in float32."""
    from .triton_kernels import softmax_

    return softmax_(scores_WHQT, mask, scaling, softcap)


def is_served(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compute norms, gated MLPs and attention of this type here."""
    return device.type in SERVED and dtype in SIXTEEN_BITS and _kernels_work(device, dtype)


@cache
def _kernels_work(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton compiles for this device, and norms and attention are torch's; warns once if not."""
    if importlib.util.find_spec("triton") is None:
        warnings.warn(f"{device}: triton is not installed; models use torch's own kernels", stacklevel=2)
        return False
    from . import triton_kernels

    like = torch.empty(0, device=device, dtype=dtype)
    scores, weight = 4 * _drawn(like, 2, 2, 3, 40), _drawn(like, 40)
    mask = torch.full_like(scores[:1, :1], torch.finfo(dtype).min).triu(38)

    def own_norm(x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x.float(), (40,), weight.float(), 1e-3).to(dtype)

    def own_probabilities(scores: Tensor) -> Tensor:
        capped = (scores.double() * 0.5 / 30.0).tanh() * 30.0 + mask.double()
        return torch.softmax(capped, dim=-1).to(dtype)

    return _agrees(
        "the norm", own_norm, lambda x: triton_kernels.norm(x, weight, 1e-3, False), _rows_for_norm(weight, 1e-3)
    ) and _agrees("attention", own_probabilities, lambda x: probabilities_(x.clone(), mask, 0.5, 30.0), scores)


def _agrees(whose: str, own: Forward, fused: Forward, x: Tensor) -> bool:
    """Whether a kernel gives the model's own result up to a few roundings; warns if not."""
    try:
        with torch.no_grad():
            found, expected = fused(x).float(), own(x).float()
        off, size = float((found - expected).norm()), float(expected.norm())
        if off <= TOLERANCE[x.dtype] * size:
            return True
        reason = f"its results are off by {off:.1e}, where they are {size:.1e}"
    except Exception as error:  # noqa: BLE001 (an old GPU, no C compiler, a driver: a compiler fails in many ways)
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
    warnings.warn(f"{x.device}: the kernel for {whose} is not used, which is slower: {reason}", stacklevel=2)
    return False


def _rows_for_norm(weight: Tensor, epsilon: float) -> Tensor:
    """Rows of size one, and rows so small that epsilon counts."""
    rows = _drawn(weight, 4, len(weight))
    rows[2:] *= epsilon**0.5
    return rows


def _drawn(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
