"""Batches of windows: from a split of the store in its order, or from text through the model.

`Windows` are token rows and their activations, on one device; `Sums` are sums over batches.

W windows, T positions, D residual width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from ...cache_schema import AttentionCsr, AttentionSpec, Request, ShardArrays, Store
from ...cache_schema.sites import RESID, Site
from ...harvest.sparsify_attention import KeptRows, sparsify, to_csr
from ...harvest.stats import is_special
from ...train.data.batch import AttentionRows
from ...train.data.block import TORCH_DTYPES, StoredRows
from ...train.data.device_copies import send
from ..errors import SettingInvalid
from .prefix_suffix import LanguageModel

HOST = torch.device("cpu")
PART_CHUNKS = 2  # of each layer, read as one part
PARTS_IN_FLIGHT = 4  # enough to keep the readers busy with a single layer


@dataclass(frozen=True, eq=False)
class Windows:
    """Some rows of tokens."""

    tokens: Tensor  # int64 [W, T]
    keep: Tensor  # bool [W, T], neither special nor padding
    valid: Tensor  # bool [W, T], not padding
    resid: Mapping[int, Tensor] = field(default_factory=dict)  # by layer, [W, T, D] in the model's dtype
    documents: Tensor | None = None  # int64 [W, T]
    attention: Mapping[int, AttentionRows] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def context(self) -> int:
        return self.tokens.shape[1]

    def x(self, layers: Sequence[int]) -> Tensor:
        """float32 [W, T, len(layers) * D]: the residuals of some layers side by side."""
        parts = [self.resid[layer].to(torch.float32) for layer in layers]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def slice(self, start: int, stop: int) -> Windows:
        """The windows start..stop, as views."""
        rows = slice(start, stop)
        return replace(
            self,
            tokens=self.tokens[rows],
            keep=self.keep[rows],
            valid=self.valid[rows],
            resid={layer: resid[rows] for layer, resid in self.resid.items()},
            documents=None if self.documents is None else self.documents[rows],
            attention={layer: slice_attention(part, start, stop) for layer, part in self.attention.items()},
        )


def slice_attention(rows: AttentionRows, start: int, stop: int) -> AttentionRows:
    _, heads, context = rows.kept_mass.shape
    indptr = rows.indptr[start * heads * context : min(stop, len(rows.kept_mass)) * heads * context + 1]
    first, last = int(indptr[0]), int(indptr[-1])
    return AttentionRows(
        indptr=indptr - first,
        indices=rows.indices[first:last],
        data=rows.data[first:last],
        kept_mass=rows.kept_mass[start:stop],
    )


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over tokens; those of two batches are added field by field."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def store_batches(
    store: Store,
    split: str,
    layers: Sequence[int] = (),
    attention_layers: Sequence[int] = (),
    batch_windows: int = 16,
    first: int = 0,
    count: int | None = None,
    device: torch.device = HOST,
) -> Iterator[Windows]:
    """The windows first..first + count of a split in the store's order; the last batch may be smaller."""
    total = count_windows(store, split)
    stop = total if count is None else min(first + count, total)
    request = Request(
        layers=tuple(layers),
        attention_layers=tuple(attention_layers),
        tokens=True,
        documents=True,
        split=split,
        windows=(min(first, stop), stop),
    )
    pieces: list[Windows] = []
    for part in _parts(store, request):
        taken = 0
        while taken < part.span.windows:
            size = min(batch_windows - sum(map(len, pieces)), part.span.windows - taken)
            pieces.append(_windows_of(store, part, taken, taken + size, device))
            taken += size
            if sum(map(len, pieces)) == batch_windows:
                yield joined(pieces)
                pieces = []
    if pieces:
        yield joined(pieces)


def _parts(store: Store, request: Request) -> Iterator[ShardArrays]:
    """A few chunks of activations at a time, so that memory does not grow with the shards' size. Everything else is one
    chunk per shard, which is read once."""
    shards = store.stream(replace(request, layers=()))
    if not request.layers:
        yield from shards
        return
    spans = store.spans(request)
    size = PART_CHUNKS * max(map(store.chunk_windows, request.sites))
    order = [part for span in spans for part in span.cut(size, store.manifest.shard_windows)]
    shard = None
    for part in store.stream(Request(layers=request.layers), order, PARTS_IN_FLIGHT):
        if shard is None or shard.span.shard != part.span.shard:
            shard = next(shards)
        assert shard.tokens is not None and shard.documents is not None
        start, stop = part.span.start - shard.span.start, part.span.stop - shard.span.start
        attention = {layer: csr.slice(start, stop) for layer, csr in shard.attention.items()}
        tokens, documents = shard.tokens[start:stop], shard.documents[start:stop]
        yield replace(part, tokens=tokens, documents=documents, attention=attention)


def count_windows(store: Store, split: str) -> int:
    splits = store.manifest.splits
    if split not in splits:
        raise SettingInvalid(f"expected a split of {', '.join(splits)}, found {split!r}")
    begin, end = splits[split]
    return end - begin


def run_windows(
    model: LanguageModel,
    tokens_WT: Tensor,
    valid_WT: Tensor,
    layers: Sequence[int],
    attention: AttentionSpec | None = None,
) -> Windows:
    """Rows of tokens with the model's residuals there, and the attention that is asked for."""
    tokens_WT, valid_WT = tokens_WT.to(model.device), valid_WT.to(model.device)
    blocks: dict[int, list[KeptRows]] = {layer: [] for layer in (attention.layers if attention else ())}

    def keep(layer: int, probs_WHTT: Tensor) -> None:
        assert attention is not None
        blocks[layer].append(sparsify(probs_WHTT, attention))

    resid = model.resid(tokens_WT, layers, valid_WT, {layer: partial(keep, layer) for layer in blocks})
    dtype = str(model.dtype).removeprefix("torch.")
    rows = {layer: to_csr(layer, KeptRows.concat(parts), dtype=dtype) for layer, parts in blocks.items()}
    return Windows(
        tokens=tokens_WT,
        keep=valid_WT & ~is_special(tokens_WT, model.special),
        valid=valid_WT,
        resid=resid,
        attention={layer: attention_rows(csr, model.device) for layer, csr in rows.items()},
    )


def make_rows(
    model: LanguageModel, rows: Sequence[Sequence[int]], context: int, padding: Literal["right", "left"] = "right"
) -> tuple[Tensor, Tensor]:
    """Token ids and validity [W, context] of rows that are padded or cut to this length."""
    tokens = torch.full((len(rows), context), model.pad, dtype=torch.int64)
    valid = torch.zeros(len(rows), context, dtype=torch.bool)
    for number, row in enumerate(ids[:context] for ids in rows):
        place = slice(0, len(row)) if padding == "right" else slice(context - len(row), context)
        tokens[number, place] = torch.tensor(row, dtype=torch.int64)
        valid[number, place] = True
    return tokens, valid


def attention_rows(csr: AttentionCsr, device: torch.device) -> AttentionRows:
    """Attention as stored, on the device."""
    return AttentionRows(
        indptr=send(torch.from_numpy(csr.indptr.astype(np.int64)), device),
        indices=send(torch.from_numpy(csr.indices.astype(np.int64)), device),
        data=send(torch.from_numpy(csr.data.astype(np.float32)), device),
        kept_mass=send(torch.from_numpy(csr.kept_mass.astype(np.float32)), device),
    )


def joined(pieces: Sequence[Windows]) -> Windows:
    if len(pieces) == 1:
        return pieces[0]
    head = pieces[0]
    documents = [piece.documents for piece in pieces if piece.documents is not None]
    return Windows(
        tokens=torch.cat([piece.tokens for piece in pieces]),
        keep=torch.cat([piece.keep for piece in pieces]),
        valid=torch.cat([piece.valid for piece in pieces]),
        resid={layer: torch.cat([piece.resid[layer] for piece in pieces]) for layer in head.resid},
        documents=torch.cat(documents) if len(documents) == len(pieces) else None,
        attention={layer: _join_attention([p.attention[layer] for p in pieces]) for layer in head.attention},
    )


def _join_attention(parts: Sequence[AttentionRows]) -> AttentionRows:
    offsets = np.cumsum([0, *(len(part.indices) for part in parts)])
    tails = [part.indptr[1:] + int(offset) for part, offset in zip(parts, offsets, strict=False)]
    return AttentionRows(
        indptr=torch.cat([parts[0].indptr[:1], *tails]),
        indices=torch.cat([part.indices for part in parts]),
        data=torch.cat([part.data for part in parts]),
        kept_mass=torch.cat([part.kept_mass for part in parts]),
    )


def _windows_of(store: Store, part: ShardArrays, start: int, stop: int, device: torch.device) -> Windows:
    """Some windows of a span, copied out of the reader's memory."""
    assert part.tokens is not None and part.documents is not None
    rows = slice(start, stop)
    dtype = TORCH_DTYPES[store.manifest.model.dtype]
    tokens = send(torch.from_numpy(part.tokens[rows].astype(np.int64)), device)
    return Windows(
        tokens=tokens,
        keep=~is_special(tokens, store.manifest.model.special_tokens),
        valid=torch.ones_like(tokens, dtype=torch.bool),
        resid={layer: send(_resid_of(part, layer, rows, dtype), device) for layer in part.resid},
        documents=send(torch.from_numpy(part.documents[rows].astype(np.int64)), device),
        attention={layer: attention_rows(csr.slice(start, stop), device) for layer, csr in part.attention.items()},
    )


def _resid_of(part: ShardArrays, layer: int, rows: slice, dtype: torch.dtype) -> Tensor:
    """Residuals in the model's dtype; stored codes become their values, rounded to it."""
    stored, scales = part.resid[layer][rows].copy(), part.scales.get(Site(RESID, layer))
    if scales is None:
        return torch.from_numpy(stored).view(dtype)  # NumPy holds bfloat16 as uint16
    return StoredRows(torch.from_numpy(stored), torch.from_numpy(scales[rows].copy())).values().to(dtype)
