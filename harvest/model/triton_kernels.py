"""Kernels for norms, gated MLPs and attention probabilities. Importing this needs `triton`.

Each operation of the model is rounded to the model's type where the model rounds it.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Gate = Literal["silu", "gelu tanh"]

PER_WARP = 512  # elements of a row that each warp of a program holds
PER_PROGRAM = 2048  # elements of a product of gates


@triton.jit
def _norm(x, weight, out, D, epsilon, FROM_ONE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * D
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    kind = out.dtype.element_ty
    values = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
    values *= 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / D + epsilon)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if FROM_ONE:
        values *= 1.0 + factor
    else:
        values = values.to(kind).to(tl.float32) * factor
    tl.store(out + start + columns, values.to(kind), mask=inside)


@triton.jit
def _gated(gate, up, out, N, TANH: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < N
    kind = out.dtype.element_ty
    value = tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
    slope = value
    if TANH:  # (1 + tanh z) / 2 = sigmoid 2z
        slope = 1.5957691216057308 * (value + 0.044715 * value * value * value)
    falling = tl.exp(-tl.abs(slope))
    value = (value * tl.where(slope < 0, falling, 1.0) / (1.0 + falling)).to(kind).to(tl.float32)
    value *= tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, value.to(kind), mask=inside)


@triton.jit
def _softmax(
    scores, mask, Q, T, per_mask, scaling, softcap, HAS_MASK: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < T
    kind = scores.dtype.element_ty
    score = tl.load(scores + row * T + columns, mask=inside, other=0.0).to(tl.float32)
    score = (score * scaling).to(kind).to(tl.float32)
    if CAPPED:
        score = (score / softcap).to(kind).to(tl.float32)
        falling = tl.exp(-2.0 * tl.abs(score))
        size = (1.0 - falling) / (1.0 + falling)
        score = tl.where(score < 0, -size, size).to(kind).to(tl.float32)  # tanh
        score = (score * softcap).to(kind).to(tl.float32)
    if HAS_MASK:
        place = (row // per_mask) * Q * T + (row % Q) * T
        score = (score + tl.load(mask + place + columns, mask=inside, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
    score = tl.where(inside, score, float("-inf"))
    share = tl.exp(score - tl.max(score, axis=0))
    share /= tl.sum(share, axis=0)
    tl.store(scores + row * T + columns, share.to(kind), mask=inside)


def norm(x: Tensor, weight: Tensor, epsilon: float, from_one: bool) -> Tensor:
    """RMS norm over the last dimension, times the weight, or times one plus the weight."""
    x = x.contiguous()
    out, D = torch.empty_like(x), x.shape[-1]
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be that of the model
        _norm[(x.numel() // D,)](x, weight, out, D, epsilon, FROM_ONE=from_one, **_sizes(D))
    return out


def gated(gate: Tensor, up: Tensor, activation: Gate) -> Tensor:
    """act(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out, N = torch.empty_like(gate), gate.numel()
    with torch.cuda.device_of(gate):
        _gated[(triton.cdiv(N, PER_PROGRAM),)](gate, up, out, N, TANH=activation == "gelu tanh", BLOCK=PER_PROGRAM)
    return out


def softmax_(scores_WHQT: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
    """Scores to probabilities, in place; `mask` [1 or W, 1, Q, T] is added."""
    windows, heads, Q, T = scores_WHQT.shape
    per_mask = windows * heads * Q if mask is None else windows // len(mask) * heads * Q
    given = scores_WHQT if mask is None else mask.expand(len(mask), 1, Q, T).to(scores_WHQT.dtype).contiguous()
    has_mask, is_capped, cap = mask is not None, softcap is not None, softcap or 1.0
    with torch.cuda.device_of(scores_WHQT):
        _softmax[(windows * heads * Q,)](
            scores_WHQT, given, Q, T, per_mask, scaling, cap, HAS_MASK=has_mask, CAPPED=is_capped, **_sizes(T)
        )
    return scores_WHQT


def _sizes(width: int) -> dict[str, int]:
    block = 1 << (width - 1).bit_length()
    return {"BLOCK": block, "num_warps": min(max(block // PER_WARP, 1), 16)}
