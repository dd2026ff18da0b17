"""Where in a model activations are taken: a hook and its layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

RESID = "resid"
HOOKS = {
    RESID: "the residual stream after a layer",
    "mlp_in": "what the MLP reads, after its norm",
    "mlp_out": "what the MLP adds to the residual stream, after its output norm if there is one",
    "attn_out": "what attention adds to the residual stream, likewise",
    "q": "queries of all heads, before rotation by position",
    "k": "keys of all key-value heads, likewise",
    "z": "values combined by attention, of all heads, before the output projection",
}


SAE_LENS_NAMES = {  # after `blocks.L.`
    RESID: "hook_resid_post",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "z": "attn.hook_z",
}


class Site(NamedTuple):
    """A place whose activations are stored."""

    hook: str
    layer: int

    @property
    def path(self) -> str:
        """The path of the site's array in a store."""
        return f"{self.hook}/layer_{self.layer}"

    def __str__(self) -> str:
        return f"{'residuals' if self.hook == RESID else self.hook} of layer {self.layer}"


IN_A_LAYER = re.compile(r"\b(?:blocks|layers|h)\.(\d+)(?:\.(.+))?$")
_HOOKS_OF = {None: RESID, **{name: hook for hook, name in SAE_LENS_NAMES.items()}}  # by what follows the layer


def site_named(name: str) -> Site | None:
    """The site of a TransformerLens name, or of a layer's (its output is the residual stream after it), or None."""
    found = IN_A_LAYER.search(name)
    layer, place = (int(found[1]), found[2]) if found else (0, "unknown")
    if place == "hook_resid_pre" and layer > 0:
        return Site(RESID, layer - 1)  # the input of a layer is the output of the one before
    return Site(_HOOKS_OF[place], layer) if place in _HOOKS_OF else None


Place = int | Site
"""A key for activations: a layer number for the residual stream after that layer, otherwise a site."""


def place_of(hook: str, layer: int) -> Place:
    return layer if hook == RESID else Site(hook, layer)


def site_of(place: Place) -> Site:
    return place if isinstance(place, Site) else Site(RESID, place)


def key_of(place: Place) -> str:
    """The key in JSON: the layer number for the residual stream, otherwise the path."""
    return place.path if isinstance(place, Site) else str(place)


def say_place(place: Place) -> str:
    """The name of a place in messages."""
    return str(place) if isinstance(place, Site) else f"layer {place}"


def by_hook(sites: Iterable[Site]) -> dict[str, tuple[int, ...]]:
    """Hook -> its layers; hooks in the order of `HOOKS`, layers rising."""
    found = sorted(set(sites))
    hooks = {site.hook for site in found}
    order = [hook for hook in HOOKS if hook in hooks] + sorted(hooks - set(HOOKS))
    return {hook: tuple(site.layer for site in found if site.hook == hook) for hook in order}
