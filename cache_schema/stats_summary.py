"""stats/summary.json: the moments and kept mass of a finished store, merged once, in shard order.

Derived from the lines under stats/ and from the index; without it a reader merges the lines itself and
gets the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from .commits import MADE_AGAIN, read_checked
from .disk_and_cloud_files import Files
from .errors import ManifestInvalid
from .layout import SUMMARY, encode_json
from .manifest import Manifest
from .moments import Moments
from .sites import RESID, Site
from .strict_json import LATER, to_json


@dataclass(frozen=True)
class LayerSummary:
    """The fields of `Moments` for a hook in one layer, in the order of the file."""

    count: int
    mean_norm: float
    mean_square_norm: float
    windows: int
    norm_by_position: tuple[float, ...]
    mean: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """Statistics of a finished store, by layer."""

    cache_id: str
    resid: dict[int, LayerSummary]
    kept_mass: dict[int, float]  # mean over all attention rows
    entries_per_row: dict[int, float]
    hooks: dict[str, dict[int, LayerSummary]] = field(default_factory=dict, metadata={LATER: True})
    format: int = 1

    @property
    def sites(self) -> dict[Site, LayerSummary]:
        by_hook = {RESID: self.resid} | self.hooks
        return {Site(hook, layer): found for hook, layers in by_hook.items() for layer, found in layers.items()}

    def moments(self, layer: int, hook: str = RESID) -> Moments:
        fields = vars(self.sites[Site(hook, layer)]).items()
        found = {name: np.array(it) if isinstance(it, tuple) else it for name, it in fields}
        return Moments(**cast(dict[str, Any], found))


def summarise(moments: Moments) -> LayerSummary:
    found = {name: tuple(it.tolist()) if isinstance(it, np.ndarray) else it for name, it in vars(moments).items()}
    return LayerSummary(**cast(dict[str, Any], found))


def read_summary(files: Files, manifest: Manifest) -> Summary | None:
    """The summary, or None if the store has none."""
    opened = read_checked(Summary, files, manifest, SUMMARY)
    if opened is None:
        return None
    summary, where = opened
    lengths = {site: (manifest.context, manifest.width_of(site.hook)) for site in manifest.sites}
    found = {site: (len(moments.norm_by_position), len(moments.mean)) for site, moments in summary.sites.items()}
    if found != lengths:
        raise ManifestInvalid(f"{where}: expected layers, positions and widths of this store. {MADE_AGAIN}")
    return summary


def write_summary(files: Files, summary: Summary) -> None:
    files.replace(SUMMARY, encode_json(to_json(summary)))
