"""Forward hooks that read activations, or change them, while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from ...cache_schema.sites import RESID, Site
from .architectures import Tap, architecture_of


@contextmanager
def kept(stack: Any, model_type: str, sites: Iterable[Site]) -> Iterator[dict[Site, Tensor]]:
    """Collect the activations of these sites while a model runs; nothing is copied."""
    found: dict[Site, Tensor] = {}
    with tapped(stack, model_type, {site: partial(found.__setitem__, site) for site in sites}):
        yield found


@contextmanager
def tapped(stack: Any, model_type: str, taps: Mapping[Site, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Call each function with the activations of its site while a model runs; a returned tensor replaces them."""
    handles = []

    def before(tap: Tap, function: Callable[[Tensor], Tensor | None], layer: Any, _module: object, args: Any) -> Any:
        found = function(args[0] if tap.take is None else tap.take(layer, args[0]))
        return None if found is None else (found, *args[1:])

    def after(
        tap: Tap, function: Callable[[Tensor], Tensor | None], layer: Any, _module: object, _args: object, output: Any
    ) -> Any:
        """A module may return several values: the first is the activation."""
        first = output[0] if isinstance(output, tuple) else output
        found = function(first if tap.take is None else tap.take(layer, first))
        return found if found is None or not isinstance(output, tuple) else (found, *output[1:])

    architecture = architecture_of(model_type)
    for site, function in taps.items():
        tap = Tap("") if site.hook == RESID else architecture.tap(site.hook)
        layer = architecture.layers_of(stack)[site.layer]
        module = layer.get_submodule(tap.module)
        if tap.of_input:
            handles.append(module.register_forward_pre_hook(partial(before, tap, function, layer)))
        else:
            handles.append(module.register_forward_hook(partial(after, tap, function, layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
