"""What the processor at hand does at full speed."""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def has_fast_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 products run in hardware; emulated ones are slower than float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    # The public list of capabilities is younger than the oldest torch this package runs on.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


SERVED = {"cuda"}  # kinds of devices whose tensors go to Triton; a test that interprets the kernels adds the CPU


def runs_triton(tensor: Tensor) -> bool:
    """Whether the kernels of `kernels/triton/` serve this tensor; torch's own do where they do not."""
    return tensor.device.type in SERVED and has_triton()


@lru_cache
def has_triton() -> bool:
    """Whether Triton is installed, as CUDA builds of torch bring it; said once where it is not."""
    if importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn("triton is not installed: steps on this GPU use torch's own kernels, which are slower", stacklevel=2)
    return False
