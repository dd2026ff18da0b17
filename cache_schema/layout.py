"""Every name, shape and chunk of a store, and the zarr documents that describe them. Nothing else builds paths.

A manifest fixes all arrays before the first shard is written; `arrays_of(manifest)` lists them. The zarr v3
documents are built here as plain JSON, so that their bytes do not depend on zarr's version.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np

from .csr import index_dtype
from .manifest import Codec, Manifest
from .sites import RESID, Site
from .stored_dtypes import STORED_AS, UNWRITTEN

ROOT = "zarr.json"
COMMITS = "commits"
INDEX = "commits/index.json"
LOCK = "commits/lock"
SUMMARY = "stats/summary.json"
COUNTS = "stats/counts.json"
BEGINNING = ("tokens", "documents")  # arrays that are complete before the first shard is written
ATTENTION_PARTS = ("indptr", "indices", "data", "kept_mass")  # of a layer, as in `AttentionCsr`
MAX_CHUNK_BYTES = 2**31 - 17  # compressors take no more; a chunk read in part needs memory for all of it
SHARD_TOKENS = 256 * 128  # default: a shard is held in memory, and lost if its writer dies
CHUNK_BYTES = 16 * 2**20  # aim for chunks of this size: large enough to stream, small enough to overlap

# Moments of one shard and site are one float64 line: these columns, then norm_by_position [T], mean [D].
MOMENT_SCALARS = ("count", "mean_norm", "mean_square_norm", "windows")

BLOSC: dict[Codec, dict[str, Any]] = {  # every codec but raw, with the options of zarr's blosc codec
    "lz4": {"cname": "lz4", "clevel": 1, "shuffle": "bitshuffle", "blocksize": 0},
    # Large blocks of shuffled bytes: signs and exponents get an entropy code separate from the mantissas'.
    "zstd": {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 2**19},
}


@dataclass(frozen=True)
class ArrayLayout:
    """One zarr array: enough to find, decode and check its chunks without zarr."""

    path: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    fill: Any
    codec: Codec
    dims: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunks) * self.dtype.itemsize

    @property
    def inner(self) -> tuple[int, ...]:
        """Chunk indices of every axis but the first: arrays are cut along windows or shards only."""
        return (0,) * (len(self.shape) - 1)

    def chunk_key(self, index: int) -> str:
        """Key of the `index`-th chunk along the first axis."""
        return f"{self.path}/c." + ".".join(map(str, (index, *self.inner)))

    def document(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunks)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": "NaN" if isinstance(self.fill, float) and math.isnan(self.fill) else self.fill,
            "codecs": codec_documents(self.codec, self.dtype),
            "attributes": self.attributes,
            "dimension_names": list(self.dims),
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }


def codec_documents(codec: Codec, dtype: np.dtype) -> list[dict[str, Any]]:
    """The codec chain: bytes, compression if any, and always a crc32c over the bytes on disk."""
    chain: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if dtype.itemsize == 1:
        chain = [{"name": "bytes"}]
    if codec != "raw":
        chain.append({"name": "blosc", "configuration": {"typesize": dtype.itemsize, **BLOSC[codec]}})
    return [*chain, {"name": "crc32c"}]


def scales_path(site: Site) -> str:
    return f"scales/{site.path}"


def attention_path(layer: int, part: str) -> str:
    return f"attention/layer_{layer}/{part}"


def moments_path(layer: int, hook: str = RESID) -> str:
    return f"stats/layer_{layer}" if hook == RESID else f"stats/{hook}/layer_{layer}"


def record_name(shard: int) -> str:
    """Inside COMMITS."""
    return f"{shard:05d}.json"


def record_key(shard: int) -> str:
    return f"{COMMITS}/{record_name(shard)}"


def device_name(shard: int) -> str:
    """Inside COMMITS."""
    return f"{shard:05d}.device.json"


def array_document_key(path: str) -> str:
    return f"{path}/zarr.json"


def arrays_of(manifest: Manifest) -> dict[str, ArrayLayout]:
    """Every array of the store, by path."""
    arrays = [_token_array(manifest, path, "<u4", 2**32 - 1) for path in BEGINNING]
    for site in manifest.sites:
        arrays += [_site_array(manifest, site), _moments_array(manifest, site)]
        if manifest.stored_as:
            arrays.append(_token_array(manifest, scales_path(site), "<f4", float("nan")))
    for layer in manifest.attention.layers:
        arrays += _attention_arrays(manifest, layer)
    return {array.path: array for array in arrays}


def find_too_large(manifest: Manifest) -> tuple[str, bool] | None:
    """The first array whose chunks would be too large to write or read, in words, and whether even a single window is;
    None if there is none."""
    for array in arrays_of(manifest).values():
        if array.chunk_bytes > MAX_CHUNK_BYTES:
            is_window = manifest.shard_windows == 1 or (array.dims[0] == "window" and array.chunks[0] == 1)
            found = f"{array.chunk_bytes / 2**30:,.2f} GiB, {'a single window' if is_window else 'a whole shard'}"
            return f"{array.path}: expected chunks below 2 GiB, found {found}", is_window
    return None


def root_document(manifest: Manifest) -> dict[str, Any]:
    """The root group's zarr.json with the manifest and, inline, the documents of all nodes."""
    nodes = dict(sorted(_nodes(manifest).items()))
    return {
        "attributes": {"saemill": manifest.to_json()},
        "zarr_format": 3,
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": nodes},
        "node_type": "group",
    }


def documents_of(manifest: Manifest) -> dict[str, bytes]:
    """Key -> bytes of every zarr.json below the root."""
    return {array_document_key(path): encode_json(document) for path, document in _nodes(manifest).items()}


def _nodes(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Path -> zarr document of every group and array below the root."""
    arrays = arrays_of(manifest)
    parents = {"/".join(path.split("/")[:depth]) for path in arrays for depth in range(1, path.count("/") + 1)}
    groups = {path: {"attributes": {}, "zarr_format": 3, "node_type": "group"} for path in sorted(parents)}
    return groups | {path: array.document() for path, array in arrays.items()}


def encode_json(value: Any, indent: int | None = 1) -> bytes:
    return json.dumps(value, indent=indent).encode() + b"\n"


def parse_array_document(expected: ArrayLayout, document: dict[str, Any]) -> ArrayLayout | None:
    """The layout that a zarr.json describes, or None if only zarr itself can read it."""
    shape, dtype = document["shape"], document["data_type"]
    if shape != list(expected.shape) or dtype != expected.dtype.name:
        raise ValueError(
            f"expected {expected.dtype.name} {list(expected.shape)} as in the manifest, found {dtype} {shape}"
        )
    chunks = document["chunk_grid"]["configuration"]["chunk_shape"]
    if len(chunks) != len(shape) or not all(type(length) is int and length > 0 for length in chunks):
        raise ValueError(f"expected a chunk shape of {len(shape)} positive integers, found {chunks}")
    codecs = (codec for codec in get_args(Codec) if codec_documents(codec, expected.dtype) == document["codecs"])
    codec = next(codecs, None)
    has_our_keys = document["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
    if codec is None or chunks[1:] != shape[1:] or not has_our_keys:
        return None
    found = replace(expected, chunks=tuple(chunks), codec=codec)
    return found if found.chunk_bytes <= MAX_CHUNK_BYTES else None


def _token_array(manifest: Manifest, path: str, dtype: str, fill: float) -> ArrayLayout:
    """An array with one number per token."""
    shape, chunks = (manifest.windows, manifest.context), (manifest.shard_windows, manifest.context)
    return ArrayLayout(path, shape, chunks, np.dtype(dtype), fill, manifest.codec, ("window", "token"))


def _site_array(manifest: Manifest, site: Site) -> ArrayLayout:
    dtype = STORED_AS[manifest.stored_dtype]
    width = manifest.width_of(site.hook)
    chunk_windows = _chunk_windows(manifest.shard_windows, manifest.context * width * dtype.itemsize)
    return ArrayLayout(
        path=site.path,
        shape=(manifest.windows, manifest.context, width),
        chunks=(chunk_windows, manifest.context, width),
        dtype=dtype,
        fill=UNWRITTEN[manifest.stored_dtype],
        codec=manifest.codec,
        dims=("window", "token", "width"),
        attributes={"dtype": {"fp8": "float8_e4m3fn"}.get(manifest.stored_dtype, manifest.stored_dtype)}
        | ({"scales": scales_path(site)} if manifest.stored_as else {}),
    )


def _moments_array(manifest: Manifest, site: Site) -> ArrayLayout:
    columns = moment_columns(manifest.context, manifest.width_of(site.hook))
    _, length = columns["mean"]
    return ArrayLayout(
        path=moments_path(site.layer, site.hook),
        shape=(manifest.shards, length),
        chunks=(1, length),
        dtype=np.dtype("<f8"),
        fill=float("nan"),
        codec="raw",
        dims=("shard", "moment"),
        attributes={"columns": {name: list(span) for name, span in columns.items()}},
    )


def is_line(path: str) -> bool:
    """Whether the array has one line per shard instead of one row per window."""
    return path.endswith(("/indptr", "/indices", "/data")) or path.startswith("stats/")


def moment_columns(context: int, width: int) -> dict[str, tuple[int, int]]:
    """Name -> first and last-plus-one column in a shard's line of moments; the mean comes last."""
    columns = {name: (i, i + 1) for i, name in enumerate(MOMENT_SCALARS)}
    norms, mean = len(MOMENT_SCALARS), len(MOMENT_SCALARS) + context
    return columns | {"norm_by_position": (norms, mean), "mean": (mean, mean + width)}


def _attention_arrays(manifest: Manifest, layer: int) -> list[ArrayLayout]:
    rows = manifest.shard_windows * manifest.attention.heads * manifest.context
    entries = rows * min(manifest.attention.topk, manifest.context)
    codec = "zstd" if manifest.codec == "raw" else manifest.codec  # lines end in zeros, so they are never stored raw
    indices = index_dtype(manifest.context).newbyteorder("<")
    kept_shape = (manifest.windows, manifest.attention.heads, manifest.context)

    def line(part: str, length: int, dtype: np.dtype, fill: Any, last: str) -> ArrayLayout:
        path = attention_path(layer, part)
        return ArrayLayout(path, (manifest.shards, length), (1, length), dtype, fill, codec, ("shard", last))

    return [
        line("indptr", rows + 1, np.dtype("<u4"), 2**32 - 1, "row"),
        line("indices", entries, indices, 2 ** (8 * indices.itemsize) - 1, "entry"),
        line("data", entries, np.dtype("<f2"), float("nan"), "entry"),
        ArrayLayout(
            path=attention_path(layer, "kept_mass"),
            shape=kept_shape,
            chunks=(manifest.shard_windows, *kept_shape[1:]),
            dtype=np.dtype("<f2"),
            fill=float("nan"),
            codec=codec,
            dims=("window", "head", "token"),
        ),
    ]


def windows_of_a_shard(context: int) -> int:
    """The default for a new store: a power of two, so that chunks of any size divide it."""
    return 2 ** (max(1, SHARD_TOKENS // context).bit_length() - 1)


def _chunk_windows(shard_windows: int, window_bytes: int) -> int:
    """The largest divisor of a shard's windows that takes at most CHUNK_BYTES, or 1."""
    limit = max(1, min(shard_windows, CHUNK_BYTES // window_bytes))
    return next(n for n in range(limit, 0, -1) if shard_windows % n == 0)
