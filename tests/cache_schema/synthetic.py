"""Small stores whose values all follow from the manifest, so that any process can write or check them.

Loaded by `conftest.py` as a fixture, and imported by the scripts that tests run in other processes.
Shapes: N windows, W windows of a shard, T context, D width, H heads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import numpy as np

from saemill.cache_schema import (
    AttentionCsr,
    AttentionSpec,
    CorpusSpec,
    Manifest,
    ModelSpec,
    ShardContent,
    Site,
    StoreWriter,
    from_float32,
    to_float32,
)
from saemill.cache_schema.moments import is_special, measure

SPECIAL = 2


@dataclass(frozen=True)
class Corpus:
    """Everything that a store holds."""

    tokens: np.ndarray  # [N, T]
    documents: np.ndarray  # [N, T]
    resid: dict[int, np.ndarray]  # layer -> [N, T, D] as stored
    attention: dict[int, AttentionCsr]  # layer -> all windows


def make_manifest(
    windows: int = 22, context: int = 8, width: int = 6, heads: int = 2, dtype: str = "bfloat16", **changes: object
) -> Manifest:
    """22 windows in shards of 4: six shards, the last one half full; splits end inside shards."""
    manifest = Manifest(
        model=ModelSpec("toy", width, dtype=dtype, special_tokens=(SPECIAL,)),
        corpus=CorpusSpec("numbers"),
        context=context,
        layers=(3, 5),
        windows=windows,
        splits=make_splits(windows),
        attention=AttentionSpec(layers=(2, 3), heads=heads, averaged=heads == 1, topk=3),
        shard_windows=4,
    )
    return replace(manifest, **changes)


def make_splits(windows: int) -> dict[str, tuple[int, int]]:
    first, second = windows // 2, windows - windows // 6
    return {"train": (0, first), "validation": (first, second), "test": (second, windows)}


def make_corpus(manifest: Manifest, seed: int = 0) -> Corpus:
    rng = np.random.default_rng(seed)
    shape = (manifest.windows, manifest.context)
    return Corpus(
        tokens=rng.integers(0, 50, shape).astype(np.uint32),
        documents=np.repeat(np.arange(manifest.windows, dtype=np.uint32)[:, None], manifest.context, axis=1),
        resid={layer: make_resid(manifest, rng) for layer in manifest.layers},
        attention={layer: make_attention(manifest, rng) for layer in manifest.attention.layers},
    )


def make_resid(manifest: Manifest, rng: np.random.Generator) -> np.ndarray:
    shape = (manifest.windows, manifest.context, manifest.model.d_model)
    return from_float32(rng.standard_normal(shape).astype(np.float32), manifest.model.dtype)


def make_attention(manifest: Manifest, rng: np.random.Generator, empty_rows: float = 0.1) -> AttentionCsr:
    """Each query keeps up to `topk` positions that are not after it; some rows keep none."""
    spec, context = manifest.attention, manifest.context
    rows = []
    for row in range(manifest.windows * spec.heads * context):
        query = row % context
        count = 0 if rng.random() < empty_rows else min(query + 1, spec.topk)
        rows.append(np.sort(rng.choice(query + 1, count, replace=False)))
    indices = np.concatenate(rows).astype(np.uint8 if context <= 256 else np.uint16)
    return AttentionCsr(
        indptr=np.cumsum([0] + [len(row) for row in rows]).astype(np.uint32),
        indices=indices,
        data=rng.random(len(indices)).astype(np.float16),
        kept_mass=rng.random((manifest.windows, spec.heads, context)).astype(np.float16),
    )


def make_content(manifest: Manifest, corpus: Corpus, shard: int) -> ShardContent:
    start, stop = manifest.shard_range(shard)
    tokens = corpus.tokens[start:stop]
    special = is_special(tokens, manifest.model.special_tokens)
    acts = {Site("resid", layer): values[start:stop] for layer, values in corpus.resid.items()}
    return ShardContent(
        tokens=tokens,
        documents=corpus.documents[start:stop],
        acts=acts,
        moments={site: measure(to_float32(values, manifest.model.dtype), special) for site, values in acts.items()},
        attention={layer: csr.slice(start, stop) for layer, csr in corpus.attention.items()},
    )


def write_pending(writer: StoreWriter, corpus: Corpus, shards: Iterable[int] | None = None) -> list[int]:
    """Write all shards that nobody else has written or claimed; return their numbers."""
    written = []
    for shard in writer.pending() if shards is None else shards:
        with writer.claim(shard) as is_mine:
            if is_mine:
                writer.write(shard, make_content(writer.manifest, corpus, shard))
                written.append(shard)
    return written


def write_store(
    url: str | Path, manifest: Manifest, corpus: Corpus | None = None, shards: Iterable[int] | None = None
) -> Corpus:
    """Write the whole store, or some of its shards, in this process."""
    corpus = corpus or make_corpus(manifest)
    with StoreWriter.create(url, manifest, corpus.tokens, corpus.documents) as writer:
        write_pending(writer, corpus, shards)
    return corpus


def tree_of(folder: Path) -> dict[str, str]:
    """Name -> hash of every file, hidden ones included."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def objects_of(url: str) -> dict[str, str]:
    """Key -> hash of every object below a URL."""
    fs, path = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {name.removeprefix(path).lstrip("/"): hashlib.sha256(fs.cat(name)).hexdigest() for name in fs.find(path)}
