"""Forward hooks on a decoder's layers: read residuals, or change them, while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor


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
