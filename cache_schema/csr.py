"""Attention as CSR: rows in the order (window, head, query), columns are key positions in the window.

A row keeps the few largest probabilities of one query, not renormalised; `kept_mass` is their sum. All
operations are on whole arrays; nothing loops over rows.
Shapes: W windows, H heads (1 if heads were averaged), T context, R = W * H * T rows, E entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import CsrInvalid

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


@dataclass(frozen=True)
class AttentionCsr:
    """One layer's sparsified attention over some windows."""

    indptr: np.ndarray  # uint32 [R + 1], starts at 0; int64 if parts joined in memory have 2^32 entries
    indices: np.ndarray  # uint8, uint16 or uint32 [E], strictly increasing inside a row
    data: np.ndarray  # float16 [E]
    kept_mass: np.ndarray  # float16 [W, H, T]

    @property
    def windows(self) -> int:
        return self.kept_mass.shape[0]

    @property
    def heads(self) -> int:
        return self.kept_mass.shape[1]

    @property
    def context(self) -> int:
        return self.kept_mass.shape[2]

    @property
    def entries(self) -> int:
        return len(self.indices)

    def slice(self, start: int, stop: int) -> AttentionCsr:
        """Windows start..stop as views; only indptr is copied, to start at 0 again."""
        rows = self.heads * self.context
        indptr = self.indptr[start * rows : stop * rows + 1]
        first, last = (int(indptr[0]), int(indptr[-1])) if len(indptr) else (0, 0)
        return AttentionCsr(
            indptr=indptr - indptr[:1],
            indices=self.indices[first:last],
            data=self.data[first:last],
            kept_mass=self.kept_mass[start:stop],
        )

    @staticmethod
    def concat(parts: Sequence[AttentionCsr]) -> AttentionCsr:
        """The windows of all parts, one after the other."""
        if not parts:
            raise ValueError("expected at least one attention part to concatenate, found none")
        return AttentionCsr(
            indptr=_joined_pointers(parts),
            indices=np.concatenate([part.indices for part in parts]),
            data=np.concatenate([part.data for part in parts]),
            kept_mass=np.concatenate([part.kept_mass for part in parts]),
        )

    def dense(self) -> np.ndarray:
        """float32 [W, H, T, T], zero where nothing was kept: for small windows and tests."""
        dense = np.zeros((self.windows * self.heads * self.context, self.context), np.float32)
        dense[self.row_of_entry(), self.indices] = self.data
        return dense.reshape(self.windows, self.heads, self.context, self.context)

    def to_scipy(self) -> csr_matrix:
        """float32 [W * H * T, T], as scipy does not support float16. Rows are (window, head, query)."""
        from scipy.sparse import csr_matrix  # imported late: reading a store does not need it

        rows = self.windows * self.heads * self.context
        indices, indptr = self.indices.astype(np.int32), self.indptr.astype(np.int64)
        matrix = csr_matrix((self.data.astype(np.float32), indices, indptr), shape=(rows, self.context))
        matrix.has_sorted_indices = matrix.has_canonical_format = True  # the format guarantees both
        return matrix

    def row_of_entry(self) -> np.ndarray:
        """int64 [E]: the row each entry belongs to."""
        lengths = np.diff(self.indptr.astype(np.int64))
        return np.repeat(np.arange(len(lengths)), lengths)

    def validate(self, topk: int | None, causal: bool, where: str = "attention") -> None:
        """Raise `CsrInvalid` naming the first broken rule."""
        problem = _find_problem(self, topk, causal)
        if problem:
            raise CsrInvalid(f"{where}: {problem}")


def _joined_pointers(parts: Sequence[AttentionCsr]) -> np.ndarray:
    offsets = np.cumsum([0] + [part.entries for part in parts], dtype=np.int64)
    dtype = np.uint32 if offsets[-1] < 2**32 else np.int64
    tails = [part.indptr[1:] + dtype(offset) for part, offset in zip(parts, offsets, strict=False)]
    return np.concatenate([np.zeros(1, dtype), *tails])


def index_dtype(context: int) -> np.dtype:
    """The smallest type that holds a key position."""
    return np.min_scalar_type(context - 1)


def _find_problem(csr: AttentionCsr, topk: int | None, causal: bool) -> str | None:
    rows = csr.windows * csr.heads * csr.context
    if len(csr.indptr) != rows + 1:
        return f"expected {rows + 1} row pointers, found {len(csr.indptr)}"
    if csr.indptr[0] != 0:
        return f"expected the first row to start at entry 0, found {csr.indptr[0]}: a gap at the start"
    lengths = np.diff(csr.indptr.astype(np.int64))
    if (lengths < 0).any():
        return f"row pointers decrease at row {int(np.argmax(lengths < 0))}"
    if csr.indptr[-1] != csr.entries:
        return f"expected row pointers to end at {csr.entries}, the number of entries, found {csr.indptr[-1]}"
    if len(csr.data) != csr.entries:
        return f"expected {csr.entries} probabilities, one per key position, found {len(csr.data)}"
    limit = csr.context if topk is None else min(topk, csr.context)
    if (lengths > limit).any():
        row = int(np.argmax(lengths > limit))
        return f"expected at most {limit} entries in row {row}, found {lengths[row]}: a gap in the row pointers"
    is_number = np.isfinite(csr.kept_mass)
    if not is_number.all():
        return f"the kept mass of row {int(np.argmin(is_number))} is not a number"
    return _find_entry_problem(csr, lengths, causal)


def _find_entry_problem(csr: AttentionCsr, lengths: np.ndarray, causal: bool) -> str | None:
    """Check the rules for single entries; the causal limit at row ends only, because indices are sorted."""
    if not csr.entries:
        return None
    if int(csr.indices.max()) >= csr.context:
        return f"key position {csr.indices.max()} is outside the window of {csr.context}"
    rising = csr.indices[1:] > csr.indices[:-1]
    filled = lengths > 0
    ends = csr.indptr[1:][filled].astype(np.int64)
    rising[ends[:-1] - 1] = True  # a new row may start anywhere
    if not rising.all():
        return f"key positions do not rise inside a row near entry {int(np.argmin(rising))}"
    queries = np.tile(np.arange(csr.context), csr.windows * csr.heads)[filled]
    if causal and (csr.indices[ends - 1] > queries).any():
        return "a query attends to a later position, although the model is causal"
    return None
