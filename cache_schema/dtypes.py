"""Element types of residuals: how each is stored, and how stored bits become float32.

numpy has no bfloat16, so its bits are stored as uint16 and the array's attributes say so.
"""

from __future__ import annotations

import numpy as np

STORED_AS = {"bfloat16": np.dtype("<u2"), "float16": np.dtype("<f2"), "float32": np.dtype("<f4")}

# What a reader without checks sees where nothing was ever written: NaN, never zeros.
UNWRITTEN = {"bfloat16": 0x7FFF, "float16": float("nan"), "float32": float("nan")}


def to_float32(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Stored residuals as float32 values."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as stored, rounded to the nearest even where bits are lost."""
    if dtype != "bfloat16":
        return values.astype(STORED_AS[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)
