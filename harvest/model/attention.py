"""The attention function for models in this package: bit-exact eager attention that exposes its probabilities.

The operations are those of transformers' eager attention, in the same order, so residuals do not change; but they run
in place and in blocks of windows, so that on a CPU the scores never leave the cache. On a GPU a single kernel makes
probabilities of the scores of 16-bit models (`fused_on_gpu.py`). A layer's dense probabilities are passed to its sink
block by block, and freed before the next block.

Keywords reach this function through the model's forward: `sinks` maps a layer to a callable that takes probabilities
[windows, heads, queries, keys]; `probs_only` (set by `AttentionOnly`) skips everything after that.

Shape suffixes: W windows, H heads, G key-value heads, T positions, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .fused_on_gpu import probabilities_, serves_scores
from .products_in_16_bits import matmul

ATTENTION = "saemill"

Sinks = Mapping[int, Callable[[Tensor], None]]

NARROW = ("GPT2Attention",)  # these compute softmax in the model's dtype, all others in float32

CPU_BLOCK_BYTES = 1 << 21  # float32 scores of a block: larger blocks leave the cache, smaller ones only add calls
GPU_BLOCK_BYTES = 1 << 29  # limited only to save memory


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface  # imported late: it takes seconds

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, make_mask)


def make_mask(batch_size: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The eager mask: a single [1, 1, T, T] for all windows if none is padded."""
    from transformers.masking_utils import eager_mask

    return eager_mask(1 if attention_mask is None else batch_size, attention_mask=attention_mask, **kwargs)


def attend(
    module: Any,
    query_WHTE: Tensor,
    key_WGTE: Tensor,
    value_WGTE: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Sinks | None = None,
    probs_only: bool = False,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention output [W, T, H, E]; probabilities go only to this layer's sink."""
    windows, heads, context, width = query_WHTE.shape
    sink = (sinks or {}).get(module.layer_idx)
    out = query_WHTE.new_empty(windows, context, *((1,) if probs_only else (heads, width)))
    softmax_dtype = query_WHTE.dtype if type(module).__name__ in NARROW else torch.float32
    is_padded = attention_mask is not None and len(attention_mask) > 1  # then each window has its own mask
    room = CPU_BLOCK_BYTES if query_WHTE.device.type == "cpu" else GPU_BLOCK_BYTES
    size = max(1, room // (4 * heads * context * context))
    for start in range(0, windows, size):
        block = slice(start, start + size)
        mask = attention_mask if attention_mask is None or not is_padded else attention_mask[block]
        probs = _probabilities(query_WHTE[block], key_WGTE[block], mask, scaling, softcap, softmax_dtype)
        if sink is not None:
            sink(probs)
        if not probs_only:
            out[block] = matmul(probs, _for_all_heads(value_WGTE[block], heads)).transpose(1, 2)
        del probs  # frees it before the next block's scores are computed
    return out, None


def _probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, softmax_dtype: torch.dtype
) -> Tensor:
    scores = matmul(query, _for_all_heads(key, query.shape[1]).transpose(2, 3))
    if serves_scores(scores):
        return probabilities_(scores, mask, scaling, softcap)
    scores.mul_(scaling)
    if softcap is not None:
        squashed = scores.div_(softcap).tanh_()
        # tanh's output is needed for a gradient.
        scores = squashed * softcap if scores.requires_grad else squashed.mul_(softcap)
    if mask is not None:
        scores.add_(mask)
    return torch.softmax(scores, dim=-1, dtype=softmax_dtype).to(query.dtype)


def _for_all_heads(states_WGTE: Tensor, heads: int) -> Tensor:
    """Repeat each key-value head for the query heads that share it."""
    groups = states_WGTE.shape[1]
    return states_WGTE.unsqueeze(2).expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)
