"""What this machine's hardware supports at full speed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from ...data.device_copies import page_locked, send


@lru_cache
def has_fast_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 products run in hardware; emulated ones are slower than float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    # Private calls: the oldest supported torch lacks the public list of capabilities.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


READ_AT_ONCE = {"cpu"}  # device types whose numbers the host may read in each step: no queued work to wait for
SERVED = {"cuda"}  # device types whose tensors go to Triton; a test that interprets the kernels adds the CPU


def reads_at_once(tensor: Tensor) -> bool:
    """Whether shapes may depend on this tensor's values: on a GPU the host would have to wait for them."""
    return tensor.device.type in READ_AT_ONCE


def numbers(values: Sequence[float], like: Tensor) -> Tensor:
    """A few numbers from the host, in the type and on the device of `like`. A GPU is told them by its launches, which
    can be recorded, where a copy could not."""
    if reads_at_once(like):
        return torch.tensor(values, dtype=like.dtype)
    return torch.stack([like.new_full((), value) for value in values])


def constants(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers of an SAE that never change; never freed, so that a recorded step may read them."""
    return _kept(tuple(values), like.dtype, like.device)


@cache
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return send(torch.tensor(values, dtype=dtype), device)


def write_numbers(there: Tensor, values: Sequence[float] | Sequence[Sequence[float]]) -> None:
    """Overwrite a tensor with numbers from the host, without waiting for a GPU's queue."""
    there.copy_(page_locked(torch.tensor(values, dtype=there.dtype), there.device), non_blocking=True)


def runs_triton(tensor: Tensor) -> bool:
    """Whether this tensor goes to the kernels of `kernels/triton/`, or to torch's own."""
    return tensor.device.type in SERVED and has_triton(tensor.device)


@lru_cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton, which comes with CUDA builds of torch, compiles for this device; warns once if not."""
    reason = _why_no_triton(device)
    if reason is not None:
        warnings.warn(f"{device}: {reason}; steps here use torch's own kernels, which are slower", stacklevel=2)
    return reason is None


def _why_no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from .triton import exact_top_k

    try:
        exact_top_k.top_latents(torch.zeros(1, 8, device=device), 1)
    except Exception as error:  # noqa: BLE001 (an old GPU, no C compiler, a driver: a compiler fails in many ways)
        reason = str(error).partition("\n")[0][:200]  # nothing, if the error says nothing
        return f"triton cannot compile for it ({type(error).__name__}: {reason})"
    return None
