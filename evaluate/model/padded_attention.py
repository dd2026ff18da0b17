"""The attention that whole models run with: the harvest's to the bit, and rows of padding where a batch has them.

Full windows share one mask and the harvest's function, so that a stored residual is exactly what the
model computes here. A padded batch has a mask for each row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...harvest.model.attention import attend

ATTENTION = "saemill_padded"


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface  # here: it takes seconds to import

    AttentionInterface.register(ATTENTION, attend_padded)
    AttentionMaskInterface.register(ATTENTION, make_mask)


def make_mask(batch_size: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The eager mask: one for all rows where nothing is padded."""
    from transformers.masking_utils import eager_mask

    rows = 1 if attention_mask is None else batch_size
    return eager_mask(rows, attention_mask=attention_mask, **kwargs)


def attend_padded(
    module: Any,
    query_WHTE: Tensor,
    key_WGTE: Tensor,
    value_WGTE: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The harvest's attention; row by row where each has a mask of its own."""
    if attention_mask is None or attention_mask.shape[0] == 1:
        return attend(module, query_WHTE, key_WGTE, value_WGTE, attention_mask, scaling, **kwargs)
    rows = zip(query_WHTE.split(1), key_WGTE.split(1), value_WGTE.split(1), attention_mask.split(1), strict=True)
    return torch.cat([attend(module, q, k, v, mask, scaling, **kwargs)[0] for q, k, v, mask in rows]), None
