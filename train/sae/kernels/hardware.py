"""What the processor at hand does at full speed."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache
def has_fast_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 products run in hardware; emulated ones are slower than float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    # The public list of capabilities is younger than the oldest torch this package runs on.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
