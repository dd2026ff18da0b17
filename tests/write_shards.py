"""Write a store of given arrays, each shard with its moments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from saemill.cache_schema import AttentionCsr, Manifest, ShardContent, Site, StoreWriter, to_float32
from saemill.cache_schema.moments import is_special, measure


def write_shards(
    path: str | Path,
    manifest: Manifest,
    tokens: np.ndarray,
    documents: np.ndarray,
    acts: Mapping[Site, np.ndarray],
    attention: Mapping[int, AttentionCsr] | None = None,
    measured: Mapping[Site, np.ndarray] | None = None,
) -> str:
    """Activations are given as stored; moments are measured on `measured`, if given, instead of them."""
    dtype = manifest.model.dtype
    with StoreWriter.create(path, manifest, tokens, documents) as writer:
        for shard in writer.pending():
            rows = slice(*manifest.shard_range(shard))
            special = is_special(tokens[rows], manifest.model.special_tokens)
            content = ShardContent(
                tokens[rows],
                documents[rows],
                {site: values[rows] for site, values in acts.items()},
                {site: measure(to_float32(x[rows], dtype), special) for site, x in (measured or acts).items()},
                {layer: csr.slice(rows.start, rows.stop) for layer, csr in (attention or {}).items()},
            )
            with writer.claim(shard):
                writer.write(shard, content)
    return str(path)
