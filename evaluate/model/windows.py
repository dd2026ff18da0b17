"""Windows: a batch of token rows with what evaluations read of them, on one device; and sums over batches.

W windows, T positions, D residual width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor

from ...train.data.batch import AttentionRows


@dataclass(frozen=True, eq=False)
class Windows:
    """Some rows of tokens."""

    tokens: Tensor  # int64 [W, T]
    keep: Tensor  # bool [W, T], neither special nor padding
    valid: Tensor  # bool [W, T], not padding
    resid: Mapping[int, Tensor] = field(default_factory=dict)  # by layer, [W, T, D] in the model's dtype
    documents: Tensor | None = None  # int64 [W, T]
    attention: Mapping[int, AttentionRows] = field(default_factory=dict)
    numbers: Tensor | None = None  # int64 [W], the store's numbers of the windows

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
            numbers=None if self.numbers is None else self.numbers[rows],
        )


def slice_attention(rows: AttentionRows, start: int, stop: int) -> AttentionRows:
    """The attention of the windows start..stop."""
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
    """Sums over tokens, field by field; those of two batches add up."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))
