"""Where an SAE on disk reads and writes, according to its metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...cache_schema.sites import HOOKS, IN_A_LAYER, RESID, SAE_LENS_NAMES, Place, place_of, site_named
from ..errors import SaeInvalid

HOW_TO_NAME_THEM = (
    'add where it reads and writes to the metadata of its cfg.json, such as {"layers": [5], "hook": "mlp_in", '
    f'"target_layers": [5], "target_hook": "mlp_out"}}, with hooks from {", ".join(HOOKS)}'
)
NO_PLACES = f"it is a transcoder that does not say where it reads and writes: {HOW_TO_NAME_THEM}"


class Places(NamedTuple):
    """The layers and hook that an SAE reads, and those that it reconstructs."""

    layers: tuple[int, ...]
    hook: str
    target_layers: tuple[int, ...]
    target_hook: str

    @property
    def sides(self) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
        sides = (self.layers, self.hook), (self.target_layers, self.target_hook)
        read, written = (tuple(place_of(hook, layer) for layer in layers) for layers, hook in sides)
        return read, written


def place_metadata(hook: str, to_hook: str, layer: int) -> dict[str, Any]:
    """The metadata for an SAE of one layer, under this package's own names."""
    names = {"hook_name": f"blocks.{layer}.{SAE_LENS_NAMES[hook]}"}
    if to_hook != hook:
        names["hook_name_out"] = f"blocks.{layer}.{SAE_LENS_NAMES[to_hook]}"
    return {**names, "layers": [layer], "target_layers": [layer], "hook": hook, "target_hook": to_hook}


def require_places(metadata: Mapping[str, Any]) -> None:
    """Require that metadata on where an SAE reads and writes, if present, is lists of layers and known hooks."""
    for name in ("layers", "target_layers"):
        _layers(metadata, name)
    for name in ("hook", "target_hook"):
        _hook(metadata, name, RESID)


def read_places(metadata: Mapping[str, Any]) -> Places | None:
    """The places that an SAE reads and reconstructs; None if the metadata does not name them."""
    layers, targets = (_layers(metadata, name) for name in ("layers", "target_layers"))
    hook = _hook(metadata, "hook", RESID)
    name, transcodes = str(metadata.get("hook_name") or ""), bool(metadata.get("transcodes"))
    if layers and (targets or not transcodes):
        return Places(layers, hook, targets or layers, _hook(metadata, "target_hook", hook))
    site = site_named(re.sub(r"^layer_(\d+)$", r"layers.\1", name))
    if transcodes:
        if layers or targets or IN_A_LAYER.search(name):
            raise SaeInvalid(NO_PLACES)
        return None
    if site is not None:
        return Places((site.layer,), site.hook, (site.layer,), site.hook)
    if name.endswith("blocks.0.hook_resid_pre"):
        raise SaeInvalid(f"it reads the input of the first layer ({name!r}), which no store holds")
    if IN_A_LAYER.search(name) or re.search(r"\bhook_", name):
        raise SaeInvalid(f"it reads {name!r}, which is not a known place: {HOW_TO_NAME_THEM}")
    return None


def _layers(metadata: Mapping[str, Any], name: str) -> tuple[int, ...]:
    found = metadata.get(name) or []
    if not isinstance(found, list | tuple) or not all(type(one) is int and one >= 0 for one in found):
        raise SaeInvalid(f"expected {name} as a list of layers, such as [5], found {found!r:.60}")
    return tuple(found)


def _hook(metadata: Mapping[str, Any], name: str, default: str) -> str:
    found = metadata.get(name, default)
    if found not in [*HOOKS]:
        raise SaeInvalid(f"expected {name} among {', '.join(HOOKS)}, found {found!r:.60}")
    return found
