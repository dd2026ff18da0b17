"""Dense attention rows to CSR: the few keys that carry the mass, and how much of it they carry.

1. Average the heads, or keep them all; round to float16, the precision that is stored.
2. Pack each entry into one int32, probability above reversed key position. Packed entries are all
   different, so the k largest are the same set on every device, and ties go to the lower position.
3. Keep the k largest of a row, up to the one with which their sum reaches `mass`; drop zeros.
4. Repack with the position on top and sort: ascending keys, dropped entries last.
5. Off the device: what is not dropped, row after row, is the CSR.

Shape suffixes: W windows, H heads (1 where averaged), Q queries, T keys, K kept at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .errors import ContextTooLong, InvalidSparsity

MAX_CONTEXT = 1 << 15  # a position shares an int32 with the 16 bits of a float16
DROPPED = (1 << 31) - 1  # sorts behind every kept entry; its low half is a NaN, so no entry equals it
LOW_HALF = (1 << 16) - 1


@dataclass(frozen=True)
class Sparsity:
    """How much of each attention row is kept."""

    mass: float = 0.95
    """Keep the largest probabilities until their sum reaches this; 1.0 keeps every one that is not zero."""
    topk: int | None = 16
    """At most this many a row; None for no limit."""
    heads: Literal["mean", "all"] = "mean"
    """One averaged pattern for a layer, or one for each head."""

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise InvalidSparsity(f"attention mass {self.mass}: expected more than 0 and at most 1")
        if self.topk is not None and self.topk < 1:
            raise InvalidSparsity(f"attention topk {self.topk}: expected at least 1, or none for no limit")
        if self.heads not in ("mean", "all"):
            raise InvalidSparsity(f"attention heads {self.heads!r}: expected 'mean' or 'all'")


@dataclass(frozen=True)
class KeptRows:
    """Sparsified rows where they were computed: a fixed number of slots a row, so no device has to wait."""

    packed_WHQK: Tensor
    """int32: key position << 16 | float16 bits, ascending; dropped slots hold DROPPED and come last."""
    kept_mass_WHQ: Tensor
    """float16: sum of the kept probabilities of a row."""

    @staticmethod
    def concat(parts: Sequence["KeptRows"]) -> "KeptRows":
        """Rows of several runs of windows as one."""
        packed = torch.cat([part.packed_WHQK for part in parts])
        return KeptRows(packed, torch.cat([part.kept_mass_WHQ for part in parts]))


def sparsify(probs_WHQT: Tensor, settings: Sparsity) -> KeptRows:
    """Keep of each row of attention probabilities what `settings` asks for."""
    context = probs_WHQT.shape[-1]
    if context > MAX_CONTEXT:
        raise ContextTooLong(f"attention of {context} keys: at most {MAX_CONTEXT} can be stored; lower the context")
    if settings.heads == "mean":
        probs_WHQT = probs_WHQT.mean(1, keepdim=True, dtype=torch.float32)
    largest = _largest(_pack_by_value(probs_WHQT.half()), min(settings.topk or context, context))
    bits = largest >> 16
    values = _float16_of(bits)
    kept = values > 0
    if settings.mass < 1:
        kept[..., 1:] &= values.cumsum(-1)[..., :-1] < settings.mass  # exact in float32 up to 1, in any order
    kept_mass = torch.where(kept, values, 0.0).sum(-1).half()
    positions = LOW_HALF - (largest & LOW_HALF)
    packed = torch.where(kept, positions << 16 | bits, DROPPED)
    return KeptRows(_sorted(packed), kept_mass)


def to_csr(rows: KeptRows) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(indptr, indices, data, kept_mass) with rows in the order (window, head, query)."""
    packed = rows.packed_WHQK.cpu().numpy().reshape(-1, rows.packed_WHQK.shape[-1])
    is_kept = packed != DROPPED
    indptr = np.zeros(len(packed) + 1, np.uint32)
    np.cumsum(is_kept.sum(1, dtype=np.uint32), out=indptr[1:])
    entries = packed[is_kept]
    context = rows.kept_mass_WHQ.shape[-1]
    indices = (entries >> 16).astype(np.uint8 if context <= 256 else np.uint16)
    data = (entries & LOW_HALF).astype(np.uint16).view(np.float16)
    return indptr, indices, data, rows.kept_mass_WHQ.cpu().numpy()


def _pack_by_value(probs: Tensor) -> Tensor:
    """int32 that orders by probability, then by lower position: bits of the float16 above the rest."""
    bits = probs.view(torch.int16).int() & 0x7FFF  # without its sign a NaN ranks first, and shows in the mass
    reversed_positions = LOW_HALF - torch.arange(probs.shape[-1], dtype=torch.int32, device=probs.device)
    return bits << 16 | reversed_positions


def _largest(packed: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, descending."""
    if packed.device.type == "cpu" and packed.shape[-1] <= 256:
        # numpy sorts a short int32 row ten times as fast as torch.topk selects from it.
        return torch.from_numpy(np.sort(packed.numpy(), axis=-1)[..., : -count - 1 : -1].copy())
    return packed.topk(count).values


def _sorted(packed: Tensor) -> Tensor:
    if packed.device.type == "cpu":
        return torch.from_numpy(np.sort(packed.numpy(), axis=-1))
    return packed.sort(-1).values


def _float16_of(bits: Tensor) -> Tensor:
    """float32 values of float16 bit patterns."""
    return bits.to(torch.int16).view(torch.float16).float()

