"""One forward pass over a batch of windows: wanted residuals and sparsified attention, nothing else.

1. Hooks on the wanted layers keep a reference to each residual; nothing is copied.
2. The attention function hands each block of dense probabilities to `sparsify` and forgets it.
3. The pass ends where the model was cut.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..cache_schema import AttentionSpec
from .model.attention import Sinks
from .model.load import TruncatedModel, kept_outputs
from .sparsify import KeptRows, sparsify


@dataclass(frozen=True)
class Captured:
    """What one batch gave, on the device that computed it, by layer."""

    resid: dict[int, Tensor]
    """[windows, context, d_model] in the dtype of the model."""
    attention: dict[int, KeptRows]


def capture(model: TruncatedModel, ids_WT: Tensor, spec: AttentionSpec) -> Captured:
    """Run a batch of full windows through the model and keep what it was truncated for."""
    blocks: dict[int, list[KeptRows]] = {layer: [] for layer in model.wanted.attention_layers}

    def keep(layer: int, probs_WHTT: Tensor) -> None:
        blocks[layer].append(sparsify(probs_WHTT, spec))

    resid = run(model, ids_WT, {layer: partial(keep, layer) for layer in blocks})
    return Captured(resid, {layer: KeptRows.concat(parts) for layer, parts in blocks.items()})


@torch.inference_mode()
def run(model: TruncatedModel, ids_WT: Tensor, sinks: Sinks) -> dict[int, Tensor]:
    """The forward pass: residuals by layer; attention probabilities go to the sinks, block by block."""
    with kept_outputs(model.stack, model.wanted.resid_layers) as resid:
        model.stack(input_ids=ids_WT, use_cache=False, sinks=sinks)
    return resid
