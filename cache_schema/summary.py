"""stats/summary.json: the moments and kept mass of a finished store, merged once, in shard order.

Derived from the lines under stats/ and from the index; without it a reader merges the lines itself and
gets the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .commits import decode_json
from .errors import ManifestInvalid
from .files import Files
from .layout import SUMMARY, encode_json
from .manifest import FORMAT, Manifest, check_format
from .moments import Moments
from .strict import StrictError, from_json, to_json

_REMEDY = "It can be deleted: `sae-store repair` makes it again"


@dataclass(frozen=True)
class LayerSummary:
    """Moments of one layer's residuals; see moments.py for what each is over."""

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
    format: int = FORMAT

    def moments(self, layer: int) -> Moments:
        found = self.resid[layer]
        return Moments(
            count=found.count,
            mean=np.array(found.mean),
            mean_norm=found.mean_norm,
            mean_square_norm=found.mean_square_norm,
            windows=found.windows,
            norm_by_position=np.array(found.norm_by_position),
        )


def summarise(moments: Moments) -> LayerSummary:
    return LayerSummary(
        count=moments.count,
        mean_norm=moments.mean_norm,
        mean_square_norm=moments.mean_square_norm,
        windows=moments.windows,
        norm_by_position=tuple(moments.norm_by_position.tolist()),
        mean=tuple(moments.mean.tolist()),
    )


def read_summary(files: Files, manifest: Manifest) -> Summary | None:
    """The summary, or None where the store has none."""
    where = f"{files.url}/{SUMMARY}"
    try:
        value = decode_json(files.read(SUMMARY), where, _REMEDY)
    except KeyError:
        return None
    check_format(value.get("format"), where)
    try:
        summary = from_json(Summary, value)
    except StrictError as error:
        raise ManifestInvalid(f"{where}: {error}. {_REMEDY}") from None
    lengths = (manifest.context, manifest.model.d_model)
    fits = all((len(found.norm_by_position), len(found.mean)) == lengths for found in summary.resid.values())
    if summary.cache_id != manifest.cache_id or set(summary.resid) != set(manifest.layers) or not fits:
        raise ManifestInvalid(f"{where} belongs to another store. {_REMEDY}")
    return summary


def write_summary(files: Files, summary: Summary) -> None:
    files.replace(SUMMARY, encode_json(to_json(summary)))
