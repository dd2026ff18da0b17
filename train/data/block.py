"""A block: some windows of a split, in memory, ready to be drawn from.

It is on the device, in the store's own numbers (say bfloat16 or int8) until a batch is assembled there. Tokens and
documents are also on the host, for messages and measurements.
W windows, T context, H heads, D residual width, N trainable tokens, E entries of attention.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...cache_schema import AttentionCsr, Span
from ...cache_schema.layout import scales_path
from ...cache_schema.sites import Place, site_of
from .batch import AttentionRows, rounded_up
from .device_copies import send

TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.uint8,  # as bits: torch has few operations on fp8
}


@dataclass(frozen=True, eq=False)
class Block:
    """The arrays of some windows, concatenated."""

    pieces: tuple[Span, ...]
    documents: np.ndarray  # uint32 [W, T]
    trains: np.ndarray  # bool [W, T]
    tokens_on_device: Tensor  # int32 [W, T]
    documents_on_device: Tensor  # int32 [W, T]
    resid: dict[Place, StoredRows]  # [at least W * T, D]
    attention: dict[int, Attention]
    massive: dict[Place, np.ndarray]
    """bool [W, T], for layers whose massive rows are left out."""

    @property
    def context(self) -> int:
        return self.documents.shape[1]

    @cached_property
    def windows(self) -> np.ndarray:
        """int64 [W], the windows' indices in the store."""
        return np.concatenate([np.arange(piece.start, piece.stop) for piece in self.pieces])

    @cached_property
    def trainable(self) -> np.ndarray:
        """int64 [N], the flat places of trainable tokens."""
        return np.flatnonzero(self.trains)

    def trains_on(self, layers: Sequence[Place]) -> np.ndarray:
        """bool [W, T], the tokens that train an SAE on these layers: neither special nor massive in any of them."""
        trains = self.trains
        for layer in layers:
            trains = trains & ~self.massive[layer]
        return trains


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Activations in stored form: numbers, or codes with a scale for each token."""

    stored: Tensor  # [..., D]
    scales: Tensor | None = None  # float32 [...]

    def windows(self, rows: slice) -> StoredRows:
        """Some windows of [W, T, D]."""
        return StoredRows(self.stored[rows], None if self.scales is None else self.scales[rows])

    def by_path(self, place: Place) -> dict[str, Tensor]:
        """The tensors by the paths of the store's arrays."""
        site = site_of(place)
        return {site.path: self.stored} | ({} if self.scales is None else {scales_path(site): self.scales})

    def norms(self) -> Tensor:
        """float32 [W, T], a few windows at a time: a whole piece in float32 would take too much memory."""
        if self.scales is None:
            return torch.linalg.vector_norm(self.stored, dim=-1, dtype=torch.float32)
        parts = (self.windows(slice(at, at + 16)).values() for at in range(0, len(self.stored), 16))
        return torch.cat([torch.linalg.vector_norm(part, dim=-1) for part in parts])

    def flat(self) -> StoredRows:
        """[n, D]"""
        return StoredRows(self.stored.flatten(0, -2), None if self.scales is None else self.scales.flatten())

    def take(self, places: Tensor) -> StoredRows:
        """Rows of a flat table, in the order given."""
        scales = None if self.scales is None else self.scales.index_select(0, places)
        return StoredRows(self.stored.index_select(0, places), scales)

    def values(self) -> Tensor:
        """float32 [..., D]"""
        if self.scales is None:
            return self.stored.to(torch.float32)
        if self.stored.dtype == torch.int8:
            return self.stored.to(torch.float32).mul_(self.scales[..., None])
        # Shifted into the bits of float16, whose exponent bias is larger by 8: torch's conversion is slow on a CPU.
        halves = self.stored.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
        return halves.view(torch.float16).to(torch.float32).mul_((self.scales * 256)[..., None])


@dataclass(frozen=True, eq=False)
class Attention:
    """A layer's attention on the device; rows are (window, head, query)."""

    indptr: Tensor  # int64 [W * H * T + 1]
    indices: Tensor  # uint8, int16 or int32 [E]
    data: Tensor  # float16 [E]
    kept_mass: Tensor  # float16 [W, H, T]
    begins: np.ndarray  # int64 [W + 1], where each window's entries start, on the host
    longest: int  # entries in the longest row

    def entries(self, windows: np.ndarray) -> int:
        """The number of entries in some windows."""
        return int((self.begins[windows + 1] - self.begins[windows]).sum())

    def take(self, windows: np.ndarray, windows_on_device: Tensor) -> AttentionRows:
        """The rows of some windows, in the order given."""
        heads, context = self.kept_mass.shape[1:]
        rows, count = heads * context, self.entries(windows)
        lengths = self.indptr.diff().view(-1, rows)[windows_on_device]
        indptr = torch.cat([lengths.new_zeros(1), lengths.view(-1).cumsum(0)])
        # The entries of a window are contiguous, so all of them move by the same shift.
        shift = self.indptr[windows_on_device * rows] - indptr[:-1:rows]
        entry = torch.arange(count, device=shift.device)
        entry += shift.repeat_interleave(lengths.sum(1), output_size=count)
        return AttentionRows(
            indptr, as_int64(self.indices[entry]), self.data[entry].float(), self.kept_mass[windows_on_device].float()
        )


def send_attention(csr: AttentionCsr, device: torch.device) -> Attention:
    indptr = csr.indptr.astype(np.int64)
    arrays = (indptr, as_signed(csr.indices), csr.data, csr.kept_mass)
    there = (send(torch.from_numpy(array), device) for array in arrays)
    longest = int(np.diff(indptr).max(initial=0))
    return Attention(*there, begins=indptr[:: csr.heads * csr.context], longest=longest)


def even_size(layers: Collection[Attention], windows: np.ndarray) -> int:
    """A size that the layers' entries of some windows are padded to, such that batches have few sizes: as if each row
    were as long as the longest; where that would be more than twice as many, the next of few sizes."""
    largest = max(attention.entries(windows) for attention in layers)
    full = max(attention.longest * attention.kept_mass[0].numel() for attention in layers) * len(windows)
    return full if full <= 2 * largest else rounded_up(largest)


def as_signed(array: np.ndarray) -> np.ndarray:
    """The same bits as signed integers: torch has few operations on unsigned ones except uint8."""
    return array if array.dtype == np.uint8 else array.view(f"<i{array.dtype.itemsize}")


def as_int64(stored: Tensor) -> Tensor:
    """int64: the unsigned numbers that `as_signed` took the bits of."""
    return stored.long() if stored.dtype == torch.uint8 else stored.long().bitwise_and_(256**stored.itemsize - 1)


def as_stored(tensor: Tensor) -> np.ndarray:
    """A numpy array over a host tensor's memory, in the type that the store reads into: uint16 for bfloat16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def copied(csr: AttentionCsr) -> AttentionCsr:
    """A copy that stays valid when the memory it was read into is reused."""
    return AttentionCsr(csr.indptr.copy(), csr.indices.copy(), csr.data.copy(), csr.kept_mass.copy())
