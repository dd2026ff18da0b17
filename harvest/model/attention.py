"""The attention function that models run with here: bit-exact eager attention that hands out its probabilities.

The operations are those of transformers' eager attention, in the same order, so residuals do not change; but they run
in place and in blocks of windows, so that on a CPU the scores never leave the cache. A layer's dense probabilities
are passed to its sink block by block and dropped before the next block.

Keywords reach this function through the model's forward: `sinks` maps a layer to a callable that takes
probabilities [windows, heads, queries, keys]; `probs_only` (set by `AttentionOnly`) returns after that.

Shape suffixes: W windows, H heads, G key-value heads, T positions, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .products_in_16_bits import matmul

ATTENTION = "saemill"

Sinks = Mapping[int, Callable[[Tensor], None]]

NARROW = ("GPT2Attention",)  # computes softmax in the model's dtype; the others in float32

CPU_BLOCK_BYTES = 1 << 21  # float32 scores of a block: larger blocks leave the cache, smaller ones only add calls
GPU_BLOCK_BYTES = 1 << 29  # here the limit is memory


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface  # here, as it takes seconds to import

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
    """Attention output [W, T, H, E]; probabilities go to the sink of this layer and nowhere else."""
    windows, heads, context, width = query_WHTE.shape
    sink = (sinks or {}).get(module.layer_idx)
    out = query_WHTE.new_empty(windows, context, *((1,) if probs_only else (heads, width)))
    made_in = query_WHTE.dtype if type(module).__name__ in NARROW else torch.float32
    is_padded = attention_mask is not None and len(attention_mask) > 1  # if padded, each row has a mask of its own
    size = _windows_per_block(query_WHTE)
    for start in range(0, windows, size):
        block = slice(start, start + size)
        mask = attention_mask if attention_mask is None or not is_padded else attention_mask[block]
        probs = _probabilities(query_WHTE[block], key_WGTE[block], mask, scaling, softcap, made_in)
        if sink is not None:
            sink(probs)
        if not probs_only:
            out[block] = matmul(probs, _for_all_heads(value_WGTE[block], heads)).transpose(1, 2)
        del probs  # or it would stay in memory while the next block's scores are made
    return out, None


def _probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, made_in: torch.dtype
) -> Tensor:
    scores = matmul(query, _for_all_heads(key, query.shape[1]).transpose(2, 3))
    scores.mul_(scaling)
    if softcap is not None:
        squashed = scores.div_(softcap).tanh_()
        # A gradient needs tanh's output.
        scores = squashed * softcap if scores.requires_grad else squashed.mul_(softcap)
    if mask is not None:
        scores.add_(mask)
    return torch.softmax(scores, dim=-1, dtype=made_in).to(query.dtype)


def _for_all_heads(states_WGTE: Tensor, heads: int) -> Tensor:
    """Repeat each key-value head for the query heads that share it."""
    groups = states_WGTE.shape[1]
    return states_WGTE.unsqueeze(2).expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)


def _windows_per_block(query_WHTE: Tensor) -> int:
    _, heads, context, _ = query_WHTE.shape
    room = CPU_BLOCK_BYTES if query_WHTE.device.type == "cpu" else GPU_BLOCK_BYTES
    return max(1, room // (4 * heads * context * context))
