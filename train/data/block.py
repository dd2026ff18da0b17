"""A block: some windows of a split, in memory, ready to be drawn from.

Residuals lie on the device as they are stored (bfloat16 stays bfloat16 until a batch is drawn); tokens,
documents and attention stay on the host, where batches are put together.
W windows, T context, D residual width, N trainable tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...cache_schema import AttentionCsr, Span

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, eq=False)
class Block:
    """The arrays of some windows, one after the other."""

    pieces: tuple[Span, ...]
    tokens: np.ndarray  # uint32 [W, T]
    documents: np.ndarray  # uint32 [W, T]
    trains: np.ndarray  # bool [W, T]
    resid: dict[int, Tensor]  # [at least W * T, D]
    attention: dict[int, AttentionCsr] = field(default_factory=dict)

    @property
    def context(self) -> int:
        return self.tokens.shape[1]

    @cached_property
    def windows(self) -> np.ndarray:
        """int64 [W], the windows' numbers in the store."""
        return np.concatenate([np.arange(piece.start, piece.stop) for piece in self.pieces])

    @cached_property
    def trainable(self) -> np.ndarray:
        """int64 [N], the flat places of trainable tokens."""
        return np.flatnonzero(self.trains)


def as_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Stored residuals as a tensor over the same memory; numpy holds bfloat16 as uint16."""
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if tensor.dtype != dtype else tensor


def as_stored(tensor: Tensor) -> np.ndarray:
    """The numpy array over a host tensor's memory, in the type that the store reads into."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def owned(csr: AttentionCsr) -> AttentionCsr:
    """A copy that stays valid when the memory it was read into is used again."""
    return AttentionCsr(csr.indptr.copy(), csr.indices.copy(), csr.data.copy(), csr.kept_mass.copy())


def joined(parts: Sequence[dict[int, AttentionCsr]]) -> dict[int, AttentionCsr]:
    """The attention of all pieces, layer by layer."""
    return {layer: AttentionCsr.concat([part[layer] for part in parts]) for layer in parts[0]} if parts else {}
