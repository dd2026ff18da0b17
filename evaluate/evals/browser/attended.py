"""Which earlier tokens the model attended to: of every token the strongest keys of each stored layer.

Heads are averaged. The token itself and special tokens, above all the first, say nothing and are left out.
W windows, T context, L layers, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ....train.data.batch import AttentionRows
from ...model.batches import Windows

LEVELS = 255


def attended(batch: Windows, layers: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and weights [W, T, L, K], uint16 and uint8 in steps of 1 / LEVELS; weight 0 where there is no more."""
    found = [strongest(batch.attention[layer], batch.keep, count) for layer in layers]
    positions = torch.stack([position for position, _ in found], 2).cpu().numpy().astype(np.uint16)
    weights = torch.stack([weight for _, weight in found], 2)
    return positions, (weights * LEVELS).round().clamp(0, LEVELS).to(torch.uint8).cpu().numpy()


def strongest(rows: AttentionRows, keep_WT: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions and weights [W, T, K]."""
    windows, heads, context = rows.kept_mass.shape
    row = torch.repeat_interleave(torch.arange(windows * heads * context, device=rows.data.device), rows.indptr.diff())
    query = row // (heads * context) * context + row % context
    mean = rows.data.new_zeros(windows * context * context)
    mean.index_add_(0, query * context + rows.indices, rows.data / heads)
    mean_WTT = mean.view(windows, context, context) * keep_WT[:, None, :]
    mean_WTT.diagonal(dim1=1, dim2=2).zero_()
    weights, positions = mean_WTT.topk(min(count, context), dim=2)
    return positions, weights
