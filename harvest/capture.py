"""One forward pass over a batch of windows, for the wanted residuals, hooks and sparsified attention.

Activations are kept by reference, without copies; dense probabilities are dropped block by block.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..cache_schema import AttentionSpec
from ..cache_schema.sites import Site
from .model.attention import Sinks
from .model.hooks import kept
from .model.load_and_truncate import TruncatedModel
from .sparsify_attention import KeptRows, sparsify


@dataclass(frozen=True)
class Captured:
    """The results of one batch, on the device that computed them."""

    acts: dict[Site, Tensor]
    """[windows, context, width] in the model's dtype."""
    attention: dict[int, KeptRows]


def capture(model: TruncatedModel, ids_WT: Tensor, spec: AttentionSpec) -> Captured:
    """Run a batch of full windows through the model and keep what `model.wanted` names."""
    blocks: dict[int, list[KeptRows]] = {layer: [] for layer in model.wanted.attention_layers}

    def keep(layer: int, probs_WHTT: Tensor) -> None:
        blocks[layer].append(sparsify(probs_WHTT, spec))

    acts = run(model, ids_WT, {layer: partial(keep, layer) for layer in blocks})
    return Captured(acts, {layer: KeptRows.concat(parts) for layer, parts in blocks.items()})


@torch.inference_mode()
def run(model: TruncatedModel, ids_WT: Tensor, sinks: Sinks) -> dict[Site, Tensor]:
    """Run the forward pass and return activations by site; attention probabilities go to the sinks, block by block."""
    with kept(model.stack, model.facts.model_type, model.wanted.sites) as acts:
        model.stack(input_ids=ids_WT, use_cache=False, sinks=sinks)
    return acts
