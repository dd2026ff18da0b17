"""Which rows count: neither special nor padding, nor massive in a layer that the SAE reads or writes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.windows import Windows
from .context import Context
from .loaded_sae import LoadedSae, layers_of


def mean_of_rows(context: Context, layer: int) -> Tensor:
    """float64 [D]: the mean of a layer that the store holds, over the rows that count."""
    found = context.massive(layer)
    moments = found.ordinary if found is not None and found.massive else context.store.moments(layer)
    return torch.from_numpy(moments.mean)


def ordinary_rows(context: Context, subject: LoadedSae, batch: Windows) -> Tensor:
    """bool [W, T]: those of `batch.keep` whose norm is within the bound that training has for this store."""
    rows = batch.keep
    for layer in layers_of([subject]):
        found = context.massive(layer)
        if found is not None:
            norms = torch.linalg.vector_norm(batch.resid[layer], dim=-1, dtype=torch.float32)
            rows = rows & ~((norms > found.bound) & norms.isfinite())
    return rows
