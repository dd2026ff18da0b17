"""Preallocated memory for the arrays of one shard, used again for shard after shard."""

from __future__ import annotations

import numpy as np

from .csr import index_dtype
from .layout import attention_path, line_entries, line_rows, scales_path
from .manifest import Manifest
from .request import Request
from .stored_dtypes import STORED_AS


class ShardBuffers:
    """One array for each thing a request names, large enough for any span of a shard."""

    def __init__(self, manifest: Manifest, request: Request) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        windows, context = manifest.shard_windows, manifest.context
        for path, wanted in (("tokens", request.tokens), ("documents", request.documents)):
            if wanted:
                self.arrays[path] = np.empty((windows, context), "<u4")
        for site in request.sites:
            shape = (windows, context, manifest.width_of(site.hook))
            self.arrays[site.path] = np.empty(shape, STORED_AS[manifest.stored_dtype])
            if manifest.stored_as:
                self.arrays[scales_path(site)] = np.empty(shape[:2], "<f4")
        for layer in request.attention_layers:
            self._add_attention(manifest, layer)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def _add_attention(self, manifest: Manifest, layer: int) -> None:
        kept = (manifest.shard_windows, manifest.attention.heads, manifest.context)
        self.arrays |= {
            attention_path(layer, "indptr"): np.empty((1, line_rows(manifest) + 1), "<u4"),
            attention_path(layer, "indices"): np.empty((1, line_entries(manifest)), index_dtype(manifest.context)),
            attention_path(layer, "data"): np.empty((1, line_entries(manifest)), "<f2"),
            attention_path(layer, "kept_mass"): np.empty(kept, "<f2"),
        }
