"""One forward pass over a batch of windows: wanted residuals and sparsified attention, nothing else.

1. Hooks on the wanted layers keep a reference to each residual; nothing is copied.
2. The attention function hands each block of dense probabilities to `sparsify` and forgets it.
3. The pass ends where the model was cut.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cache_schema import AttentionSpec
from .attend import Sinks
from .model import TruncatedModel
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


@contextmanager
def kept_outputs(stack: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collects the outputs of layers while a model runs."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int, _module: object, _args: object, output: Tensor) -> None:
        kept[layer] = output

    with hooked(stack, {layer: partial(keep, layer) for layer in layers}):
        yield kept


@contextmanager
def hooked(stack: Any, hooks: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
    """Forward hooks on layers of a decoder stack, gone afterwards."""
    handles = [stack.layers[layer].register_forward_hook(hook) for layer, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
