"""The content of a shard, and how it is cut into the chunks of the store's arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import xxhash

from .commits import ArrayRecord, AttentionTotals, CommitRecord
from .csr import AttentionCsr, index_dtype
from .encode_and_read_chunks import as_bytes
from .errors import ShardInvalid
from .layout import (
    ATTENTION_PARTS,
    BEGINNING,
    ArrayLayout,
    arrays_of,
    attention_path,
    is_line,
    moments_path,
    scales_path,
)
from .manifest import Manifest
from .moments import Moments, to_line
from .sites import Place, Site, say_place
from .stored_dtypes import STORED_AS, to_codes


@dataclass(frozen=True)
class ShardContent:
    """All arrays of one shard, activations as the model computed them. W its windows, T context."""

    tokens: np.ndarray  # [W, T]; written when the store is created, here for the shard's digest
    documents: np.ndarray  # [W, T]; likewise
    acts: Mapping[Site, np.ndarray]  # [W, T, width] as stored: bfloat16 as uint16
    moments: Mapping[Site, Moments]
    attention: Mapping[int, AttentionCsr] = field(default_factory=dict)
    scales: Mapping[Site, np.ndarray] = field(default_factory=dict)  # [W, T], after `as_stored` has made `acts` codes


@dataclass(frozen=True)
class ShardPart:
    """One array's share of a shard: its rows, starting at a chunk border."""

    layout: ArrayLayout
    first_chunk: int
    values: np.ndarray

    @property
    def num_chunks(self) -> int:
        return -(-len(self.values) // self.layout.chunks[0])

    def chunk(self, at: int) -> np.ndarray:
        """The part's `at`-th chunk; an array's last one is padded with the fill value."""
        length = self.layout.chunks[0]
        rows = self.values[at * length : (at + 1) * length]
        if len(rows) == length:
            return rows
        padded = np.full(self.layout.chunks, self.layout.fill, self.layout.dtype)
        padded[: len(rows)] = rows
        return padded


def lay_out(manifest: Manifest, shard: int, content: ShardContent) -> list[ShardPart]:
    """Every array of a shard as it is laid out in the store."""
    arrays = arrays_of(manifest)
    start, _ = manifest.shard_range(shard)

    def part(path: str, values: np.ndarray) -> ShardPart:
        layout = arrays[path]
        first = shard if is_line(path) else start // layout.chunks[0]
        return ShardPart(layout, first, values)

    def line(path: str, values: np.ndarray, rest: int) -> ShardPart:
        """Values padded with `rest` to a full line."""
        full = np.full((1, arrays[path].shape[1]), rest, values.dtype)
        full[0, : len(values)] = values
        return part(path, full)

    parts = [part(site.path, values) for site, values in content.acts.items()]
    parts += [part(scales_path(site), scales) for site, scales in content.scales.items()]
    for site, found in content.moments.items():
        parts.append(part(moments_path(site.layer, site.hook), to_line(found)[None]))
    for layer, csr in content.attention.items():
        parts += [
            line(attention_path(layer, "indptr"), csr.indptr, csr.indptr[-1]),  # rows of missing windows are empty
            line(attention_path(layer, "indices"), csr.indices, 0),
            line(attention_path(layer, "data"), csr.data, 0),
            part(attention_path(layer, "kept_mass"), csr.kept_mass),
        ]
    return parts


def as_stored(manifest: Manifest, content: ShardContent) -> ShardContent:
    """The same content with activations as the store keeps them. Moments stay those of the computed activations."""
    if manifest.stored_as is None:
        return content
    small = {site: to_codes(acts, manifest.model.dtype, manifest.stored_as) for site, acts in content.acts.items()}
    return replace(
        content,
        acts={site: codes for site, (codes, _) in small.items()},
        scales={site: scales for site, (_, scales) in small.items()},
    )


def validate_content(manifest: Manifest, shard: int, content: ShardContent) -> None:
    """Refuse arrays that do not fit the manifest, before anything is written."""
    start, stop = manifest.shard_range(shard)
    problems = _missing(manifest, content)
    expected = (stop - start, manifest.context)
    for name, array in (("tokens", content.tokens), ("documents", content.documents)):
        if array.shape != expected:
            problems.append(f"expected {name} of shape {expected}, found {array.shape}")
    dtype = STORED_AS[manifest.model.dtype]
    for site in manifest.sites:
        values, shape = content.acts.get(site), (*expected, manifest.width_of(site.hook))
        if values is not None and (values.shape != shape or values.dtype != dtype):
            problems.append(f"{site}: expected {dtype} {shape}, found {values.dtype} {values.shape}")
    problems += _moments_problems(manifest, content) + _attention_problems(manifest, stop - start, content)
    if problems:
        raise ShardInvalid(f"shard {shard} does not fit the manifest: " + "; ".join(problems))
    for layer, csr in content.attention.items():
        csr.validate(manifest.attention.topk, manifest.attention.causal, f"shard {shard}, attention of layer {layer}")


def make_record(manifest: Manifest, shard: int, content: ShardContent, sizes: Mapping[str, int]) -> CommitRecord:
    """The commit record: digests of the values, sizes on disk, totals of the attention."""
    plain = {path: getattr(content, path).astype("<u4") for path in BEGINNING}
    plain |= {moments_path(site.layer, site.hook): to_line(found) for site, found in content.moments.items()}
    digests = digests_by_path(plain, content.acts, content.scales, content.attention)
    return CommitRecord(
        cache_id=manifest.cache_id,
        shard=shard,
        windows=manifest.shard_range(shard),
        arrays={path: ArrayRecord(digest, sizes[path]) for path, digest in sorted(digests.items())},
        attention={layer: totals_of(csr) for layer, csr in sorted(content.attention.items())},
        format=manifest.format,
    )


def digests_by_path(
    plain: Mapping[str, np.ndarray],
    acts: Mapping[Site, np.ndarray],
    scales: Mapping[Site, np.ndarray],
    attention: Mapping[int, AttentionCsr],
) -> dict[str, str]:
    """Path -> digest of an array's values, independent of padding and codec; `plain` is keyed by path already."""
    arrays = dict(plain)
    arrays |= {site.path: values for site, values in acts.items()}
    arrays |= {scales_path(site): values for site, values in scales.items()}
    for layer, csr in attention.items():
        arrays |= {attention_path(layer, part): getattr(csr, part) for part in ATTENTION_PARTS}
    return {path: array_digest(values) for path, values in arrays.items()}


def array_digest(*arrays: np.ndarray) -> str:
    """Digest of the values of one or more arrays, one after the other, as little-endian bytes.

    Fast enough to hash every committed byte without slowing the harvest; no protection against forgery.
    """
    state = xxhash.xxh3_128()
    for array in arrays:
        state.update(as_bytes(np.ascontiguousarray(array)).data)
    return f"xxh3_128:{state.hexdigest()}"


def _missing(manifest: Manifest, content: ShardContent) -> list[str]:
    wanted = {
        "activations": (sorted(manifest.sites), sorted(content.acts)),
        "moments": (sorted(manifest.sites), sorted(content.moments)),
        "attention": (sorted(manifest.attention.layers), sorted(content.attention)),
    }
    return [
        f"expected {name} of {_list(places)}, found {_list(found)}"
        for name, (places, found) in wanted.items()
        if places != found
    ]


def _list(places: Sequence[Place]) -> str:
    return ", ".join(map(say_place, places)) or "no layer"


def _moments_problems(manifest: Manifest, content: ShardContent) -> list[str]:
    expected = {site: (manifest.context, manifest.width_of(site.hook)) for site in manifest.sites}
    found = {site: (len(part.norm_by_position), len(part.mean)) for site, part in content.moments.items()}
    return [
        f"moments, {site}: expected {expected[site]} positions and widths, found {lengths}"
        for site, lengths in found.items()
        if site in expected and lengths != expected[site]
    ]


def _attention_problems(manifest: Manifest, windows: int, content: ShardContent) -> list[str]:
    """Types must match exactly: digests are over the values as stored."""
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


def totals_of(csr: AttentionCsr) -> AttentionTotals:
    """The sums over a layer's attention, for the commit record."""
    units = int(np.round(csr.kept_mass.astype(np.float64).sum() * 2**24))
    return AttentionTotals(csr.kept_mass.size, csr.entries, units)
