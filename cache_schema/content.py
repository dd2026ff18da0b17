"""What a shard consists of, and how it is cut into the chunks of the store's arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .commits import ArrayRecord, AttentionTotals, CommitRecord
from .csr import AttentionCsr, index_dtype
from .digest import array_digest
from .errors import ShardInvalid
from .layout import (
    ArrayLayout,
    arrays_of,
    attention_path,
    is_line,
    line_entries,
    line_rows,
    moments_path,
    resid_path,
)
from .manifest import Manifest
from .moments import Moments, to_line


@dataclass(frozen=True)
class ShardContent:
    """All arrays of one shard. W its windows, T context, D residual width."""

    tokens: np.ndarray  # [W, T]; written with the store's beginning, here for the shard's digest
    documents: np.ndarray  # [W, T]; likewise
    resid: Mapping[int, np.ndarray]  # layer -> [W, T, D] as stored: bfloat16 as uint16
    moments: Mapping[int, Moments]  # layer -> moments of its residuals
    attention: Mapping[int, AttentionCsr] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardPart:
    """One array's share of a shard: rows of the array from the first row of a chunk on."""

    layout: ArrayLayout
    first_chunk: int
    values: np.ndarray

    @property
    def num_chunks(self) -> int:
        return -(-len(self.values) // self.layout.chunks[0])

    def chunk(self, at: int) -> np.ndarray:
        """The part's `at`-th chunk; the last one of an array is filled up with the fill value."""
        length = self.layout.chunks[0]
        rows = self.values[at * length : (at + 1) * length]
        if len(rows) == length:
            return rows
        padded = np.full(self.layout.chunks, self.layout.fill, self.layout.dtype)
        padded[: len(rows)] = rows
        return padded


def lay_out(manifest: Manifest, shard: int, content: ShardContent) -> list[ShardPart]:
    """Every array of a shard as it lies in the store."""
    arrays = arrays_of(manifest)
    start, _ = manifest.shard_range(shard)

    def part(path: str, values: np.ndarray) -> ShardPart:
        layout = arrays[path]
        first = shard if is_line(path) else start // layout.chunks[0]
        return ShardPart(layout, first, values)

    parts = [part(resid_path(layer), values) for layer, values in content.resid.items()]
    parts += [part(moments_path(layer), to_line(moments)[None]) for layer, moments in content.moments.items()]
    for layer, csr in content.attention.items():
        lines = _lines(manifest, csr) | {"kept_mass": csr.kept_mass}
        parts += [part(attention_path(layer, name), values) for name, values in lines.items()]
    return parts


def validate_content(manifest: Manifest, shard: int, content: ShardContent) -> None:
    """Refuse arrays that are not those of the manifest, before anything is written."""
    start, stop = manifest.shard_range(shard)
    problems = _layer_problems(manifest, content)
    expected = (stop - start, manifest.context)
    for name, array in (("tokens", content.tokens), ("documents", content.documents)):
        if array.shape != expected:
            problems.append(f"expected {name} of shape {expected}, found {array.shape}")
    arrays = arrays_of(manifest)
    for layer, values in content.resid.items():
        dtype = arrays[resid_path(layer)].dtype if layer in manifest.layers else values.dtype
        if values.shape != (*expected, manifest.model.d_model) or values.dtype != dtype:
            shape = (*expected, manifest.model.d_model)
            problems.append(f"layer {layer}: expected {dtype} {shape}, found {values.dtype} {values.shape}")
    problems += _moments_problems(manifest, content) + _attention_problems(manifest, stop - start, content)
    if problems:
        raise ShardInvalid(f"shard {shard} does not fit the manifest: " + "; ".join(problems))
    for layer, csr in content.attention.items():
        csr.validate(manifest.attention.topk, manifest.attention.causal, f"shard {shard}, attention of layer {layer}")


def make_record(manifest: Manifest, shard: int, content: ShardContent, sizes: Mapping[str, int]) -> CommitRecord:
    """The commit record: digests of the values, sizes on disk, totals of the attention."""
    digests = digests_of(content)
    return CommitRecord(
        cache_id=manifest.cache_id,
        shard=shard,
        windows=manifest.shard_range(shard),
        arrays={path: ArrayRecord(digest, sizes[path]) for path, digest in sorted(digests.items())},
        attention={layer: _totals(csr) for layer, csr in sorted(content.attention.items())},
    )


def digests_of(content: ShardContent) -> dict[str, str]:
    """Digest of the values of every array, free of padding and of how they are stored."""
    digests = {
        "tokens": array_digest(content.tokens.astype("<u4")),
        "documents": array_digest(content.documents.astype("<u4")),
    }
    digests |= {resid_path(layer): array_digest(values) for layer, values in content.resid.items()}
    digests |= {moments_path(layer): array_digest(to_line(moments)) for layer, moments in content.moments.items()}
    for layer, csr in content.attention.items():
        parts = {"indptr": csr.indptr, "indices": csr.indices, "data": csr.data, "kept_mass": csr.kept_mass}
        digests |= {attention_path(layer, name): array_digest(values) for name, values in parts.items()}
    return digests


def _layer_problems(manifest: Manifest, content: ShardContent) -> list[str]:
    wanted = {
        "residuals": (manifest.layers, content.resid),
        "moments": (manifest.layers, content.moments),
        "attention": (manifest.attention.layers, content.attention),
    }
    return [
        f"expected {name} of layers {sorted(layers)}, found {sorted(found)}"
        for name, (layers, found) in wanted.items()
        if set(layers) != set(found)
    ]


def _moments_problems(manifest: Manifest, content: ShardContent) -> list[str]:
    expected = (manifest.context, manifest.model.d_model)
    found = {layer: (len(part.norm_by_position), len(part.mean)) for layer, part in content.moments.items()}
    return [
        f"moments of layer {layer}: expected {expected} positions and widths, found {lengths}"
        for layer, lengths in found.items()
        if lengths != expected
    ]


def _attention_problems(manifest: Manifest, windows: int, content: ShardContent) -> list[str]:
    """Types are exact: the digest is of the values as they are stored."""
    kept = (windows, manifest.attention.heads, manifest.context)
    types = {"indptr": np.uint32, "indices": index_dtype(manifest.context), "data": np.float16, "kept_mass": np.float16}
    problems = []
    for layer, csr in content.attention.items():
        if csr.kept_mass.shape != kept:
            problems.append(f"attention of layer {layer}: expected kept mass {kept}, found {csr.kept_mass.shape}")
        problems += [
            f"attention of layer {layer}: expected {name} of {np.dtype(dtype)}, found {getattr(csr, name).dtype}"
            for name, dtype in types.items()
            if getattr(csr, name).dtype != dtype
        ]
    return problems


def _lines(manifest: Manifest, csr: AttentionCsr) -> dict[str, np.ndarray]:
    """A shard's CSR as full lines: entries at the front, zeros behind; empty rows where windows lack."""
    indptr = np.full((1, line_rows(manifest) + 1), csr.indptr[-1], np.uint32)
    indptr[0, : len(csr.indptr)] = csr.indptr
    indices = np.zeros((1, line_entries(manifest)), csr.indices.dtype)
    indices[0, : csr.entries] = csr.indices
    data = np.zeros((1, line_entries(manifest)), np.float16)
    data[0, : csr.entries] = csr.data
    return {"indptr": indptr, "indices": indices, "data": data}


def _totals(csr: AttentionCsr) -> AttentionTotals:
    units = int(np.round(csr.kept_mass.astype(np.float64).sum() * 2**24))
    return AttentionTotals(csr.kept_mass.size, csr.entries, units)
