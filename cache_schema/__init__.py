"""The store: its files, its writers and its readers. Imports numpy and zarr, never torch."""

from .csr import AttentionCsr
from .errors import (
    AddressInvalid,
    ChunkMissing,
    CsrInvalid,
    FormatTooNew,
    ImportInvalid,
    LaunchInvalid,
    ManifestInvalid,
    RequestInvalid,
    ShardCorrupt,
    ShardInvalid,
    StoreBusy,
    StoreError,
    StoreFull,
    StoreMismatch,
    StoreMissing,
    StoreUnfinished,
    StoreUnreachable,
)
from .manifest import AttentionSpec, CorpusSpec, HookSpec, Manifest, ModelSpec
from .moments import Moments
from .reader import Store, shard_memory
from .requests_and_spans import Request, ShardArrays, Span
from .shard_content import ShardContent
from .sites import Site
from .stored_dtypes import from_float32, to_float32
from .writer import StoreWriter

__all__ = [
    "AddressInvalid",
    "AttentionCsr",
    "AttentionSpec",
    "ChunkMissing",
    "CorpusSpec",
    "CsrInvalid",
    "FormatTooNew",
    "HookSpec",
    "ImportInvalid",
    "LaunchInvalid",
    "Manifest",
    "ManifestInvalid",
    "ModelSpec",
    "Moments",
    "Request",
    "RequestInvalid",
    "ShardArrays",
    "ShardContent",
    "ShardCorrupt",
    "ShardInvalid",
    "Site",
    "Span",
    "Store",
    "StoreBusy",
    "StoreError",
    "StoreFull",
    "StoreMismatch",
    "StoreMissing",
    "StoreUnfinished",
    "StoreUnreachable",
    "StoreWriter",
    "from_float32",
    "shard_memory",
    "to_float32",
]
