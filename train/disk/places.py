"""Where an SAE on disk reads and writes, as far as its metadata say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...cache_schema.sites import HOOKS, IN_A_LAYER, RESID, SAE_LENS_NAMES, Place, place_of, site_named
from ..errors import SaeInvalid

Places = tuple[Place, ...]


def told_of(hook: str, to_hook: str, layer: int) -> dict[str, Any]:
    """Metadata of an SAE of one layer, under the names that this package's own have."""
    names = {"hook_name": f"blocks.{layer}.{SAE_LENS_NAMES[hook]}"}
    if to_hook != hook:
        names["hook_name_out"] = f"blocks.{layer}.{SAE_LENS_NAMES[to_hook]}"
    return {**names, "layers": [layer], "target_layers": [layer], "hook": hook, "target_hook": to_hook}


def places_told(metadata: Mapping[str, Any]) -> tuple[Places, Places] | None:
    """What it reads and what it rebuilds; None where it does not say."""
    layers = metadata.get("layers")
    if layers:
        hooks = metadata.get("hook", RESID), metadata.get("target_hook", RESID)
        sides = layers, metadata.get("target_layers") or layers
        read, written = (tuple(place_of(hook, n) for n in side) for hook, side in zip(hooks, sides, strict=True))
        return read, written
    name = metadata.get("hook_name")
    found = IN_A_LAYER.search(name) if isinstance(name, str) else None
    if found is None:
        return None
    site, layer = site_named(found.string), found[1]
    if site is None or metadata.get("transcodes"):
        raise SaeInvalid(
            f"it names {name} alone, which does not say what of a store it reads and rebuilds: write into the metadata "
            f'of its cfg.json where that is, as {{"layers": [{layer}], "hook": "mlp_in", "target_layers": [{layer}], '
            f'"target_hook": "mlp_out"}}, with hooks of {", ".join(HOOKS)}'
        )
    return (place_of(*site),), (place_of(*site),)
