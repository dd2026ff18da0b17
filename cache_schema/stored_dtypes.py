"""Element types of activations: how each is stored, and how stored bits become float32.

numpy has no bfloat16, so its bits are stored as uint16, with the type in the array's attributes; likewise fp8
(float8_e4m3fn) as uint8. int8 and fp8 are codes: a token's activations are its codes times its scale, so that a row
of massive norm costs no other row precision.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np

SmallDtype = Literal["int8", "fp8"]
STORED_AS = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("i1"),
    "fp8": np.dtype("u1"),
}

# Fill values, for readers without checks: NaN, never zeros; in int8 an unused code.
UNWRITTEN = {
    "bfloat16": 0x7FFF,
    "float16": float("nan"),
    "float32": float("nan"),
    "int8": -128,
    "fp8": 0x7F,
}
EXPONENT = {"bfloat16": np.uint16(0x7F80), "float16": np.uint16(0x7C00)}
LARGEST: dict[SmallDtype, float] = {"int8": 127.0, "fp8": 448.0}  # the value of the largest code
ROUND_VALUES = 2**16  # rounded at a time, so that they stay in the processor's cache
LEAST_SCALE = np.finfo(np.float32).tiny  # rows that would need a smaller scale become zeros


def why_not_uint32(ids: np.ndarray) -> str:
    """The reason why tokens or documents cannot be stored as uint32, in words; empty if they can."""
    if ids.dtype.kind not in "iu":
        return f"{ids.dtype}"
    if not ids.size or np.can_cast(ids.dtype, np.uint32):
        return ""
    low, high = int(ids.min()), int(ids.max())
    return "" if low >= 0 and high < 2**32 else f"{ids.dtype} from {low} to {high}"


def to_float32(stored: np.ndarray, dtype: str, scales: np.ndarray | None = None) -> np.ndarray:
    """Stored activations [..., D] as float32 values; `scales` [...] are those of their tokens, if any."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    values = FP8_VALUES[stored] if dtype == "fp8" else stored.astype(np.float32)
    return values if scales is None else np.multiply(values, scales[..., None], out=values)


def all_finite(stored: np.ndarray, dtype: str) -> bool:
    """Whether stored activations are finite. For 16 bits this tests the exponent, all ones only in NaN and infinity,
    without a copy in float32."""
    if dtype not in EXPONENT:
        return bool(np.isfinite(stored).all())
    exponent = EXPONENT[dtype]
    return not ((stored.view(np.uint16) & exponent) == exponent).any()


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values in stored form, rounded to nearest even."""
    if dtype != "bfloat16":
        return values.astype(STORED_AS[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def to_codes(stored: np.ndarray, dtype: str, small: SmallDtype) -> tuple[np.ndarray, np.ndarray]:
    """Codes, like `stored` [..., D], and scales float32 [...]: each row's largest value gets the largest code."""
    rows = stored.reshape(-1, stored.shape[-1])
    codes, scales = np.empty(rows.shape, STORED_AS[small]), np.empty(len(rows), np.float32)
    count = max(1, ROUND_VALUES // rows.shape[1])
    for start in range(0, len(rows), count):
        part = slice(start, start + count)
        values = to_float32(rows[part], dtype)
        scale = np.abs(values).max(axis=1) / np.float32(LARGEST[small])
        scale[scale < LEAST_SCALE] = 0
        values /= np.where(scale > 0, scale, np.float32(np.inf))[:, None]
        scales[part] = scale
        codes[part] = np.rint(values) if small == "int8" else _fp8_codes(values)
    return codes.reshape(stored.shape), scales.reshape(stored.shape[:-1])


def _fp8_codes(values: np.ndarray) -> np.ndarray:
    """float8_e4m3fn of float32 values no larger than 448, rounded to nearest even as torch does.

    Looked up by their upper sixteen bits, the last one set if any lower bit is: enough to round to three bits.
    """
    halves = values.view("<u2")
    return _fp8_by_upper_bits().take(halves[:, 1::2] | (halves[:, ::2] != 0))


@cache
def _fp8_by_upper_bits() -> np.ndarray:
    """uint8 [65536]"""
    bits = np.arange(2**16, dtype=np.uint32) << 16
    size = np.minimum(bits & 0x7FFFFFFF, np.float32(LARGEST["fp8"]).view(np.uint32))
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # bias 127 to 7, 23 bits to 3
    small = np.rint(size.view(np.float32) * 512).astype(np.uint32)  # below 2^-6 codes are multiples of 2^-9
    return (np.where(size < 121 << 23, small, normal) | bits >> 24 & 0x80).astype(np.uint8)


def _fp8_values() -> np.ndarray:
    codes = np.arange(256, dtype=np.int64)
    exponent, fraction = codes >> 3 & 15, codes & 7
    sizes = np.where(exponent > 0, np.ldexp(8.0 + fraction, exponent - 10), np.ldexp(1.0 * fraction, -9))
    sizes[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -sizes, sizes).astype(np.float32)


FP8_VALUES = _fp8_values()
