"""Dense attention rows to CSR: the few keys that carry the mass, and their share of it.

1. Average the heads, or keep them all; round to float16, the precision that is stored. Sinks that are left out
   become zero: they take no slot, and `mass` is a share of the mass of a row's other keys.
2. Pack each entry into one int32, probability above reversed key position. Packed entries are all different, so the k
   largest are the same set on every device, and ties go to the lower position.
3. Keep the k largest of a row, up to the one at which their sum reaches `mass`; drop zeros.
4. Repack with the position on top and sort: ascending keys, dropped entries last.
5. On the host: the entries not dropped, row after row, are the CSR.

Shape suffixes: W windows, H heads (1 if averaged), Q queries, T keys, K kept at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..cache_schema import AttentionCsr, AttentionSpec
from ..cache_schema.csr import index_dtype
from .errors import ContextTooLong, NonFiniteAttention, name_window, say_overflow

MAX_CONTEXT = 1 << 15  # a position shares an int32 with the 16 bits of a float16
DROPPED = (1 << 31) - 1  # sorts after every kept entry; its low half is a NaN, so no entry equals it
LOW_HALF = (1 << 16) - 1
SHORT_ROW = 256  # up to this length numpy sorts a row of int32 ten times as fast as torch.topk selects from it


@dataclass(frozen=True)
class KeptRows:
    """Sparsified rows on their device, with a fixed number of slots per row, so that no device has to synchronise."""

    packed: Tensor
    """int32 [W, H, Q, K]: key position << 16 | float16 bits, ascending; dropped slots hold DROPPED and come last."""
    kept_mass: Tensor
    """float16 [W, H, Q]: sum of a row's kept probabilities; NaN if the row was not finite or all zeros."""

    @staticmethod
    def concat(parts: Sequence[KeptRows]) -> KeptRows:
        """The rows of consecutive batches of windows."""
        packed = torch.cat([part.packed for part in parts])
        return KeptRows(packed, torch.cat([part.kept_mass for part in parts]))


def require_context(context: int) -> None:
    """Require that key positions can be stored."""
    if context > MAX_CONTEXT:
        raise ContextTooLong(
            f"attention to {context} keys: at most {MAX_CONTEXT} can be stored. Lower the context (--context), or keep "
            "no attention (--attention-layers none)"
        )


def sparsify(probs_WHQT: Tensor, spec: AttentionSpec) -> KeptRows:
    """Keep the largest of each row of attention probabilities, as `spec` asks; a mass of 1 keeps all but zeros."""
    context = probs_WHQT.shape[-1]
    require_context(context)
    if spec.averaged:
        probs_WHQT = probs_WHQT.mean(1, keepdim=True, dtype=torch.float32)
    probs_WHQT = probs_WHQT.half()
    enough: float | Tensor = spec.mass
    largest_of_all = None
    if spec.left_out:
        largest_of_all = probs_WHQT.amax(-1)
        probs_WHQT = probs_WHQT.masked_fill(sinks(spec, context, probs_WHQT.device), 0)
        enough = (spec.mass * probs_WHQT.sum(-1, keepdim=True, dtype=torch.float64)).float()  # exact, in any order
    largest = _largest(_pack_by_value(probs_WHQT), min(spec.topk, context))
    bits = largest >> 16
    values = bits.to(torch.int16).view(torch.float16).float()
    kept = values > 0
    if spec.mass < 1:
        kept[..., 1:] &= values.cumsum(-1)[..., :-1] < enough  # exact in float32 up to 1, in any order
    kept_mass = torch.where(kept, values, 0.0).sum(-1).half()
    # A softmax always has an entry above zero; a row without one, or with NaN, is marked.
    sign = kept_mass if largest_of_all is None else largest_of_all
    kept_mass.masked_fill_(~((sign > 0) & sign.isfinite()), torch.nan)
    positions = LOW_HALF - (largest & LOW_HALF)
    return KeptRows(_ascending(torch.where(kept, positions << 16 | bits, DROPPED)), kept_mass)


def sinks(spec: AttentionSpec, context: int, device: torch.device | str = "cpu") -> Tensor:
    """bool [Q, T]: the keys that are left out."""
    found = torch.zeros(context, context, dtype=torch.bool, device=device)
    if "bos" in spec.left_out:
        found[:, 0] = True
    if "self" in spec.left_out:
        found.fill_diagonal_(True)
    return found


def to_csr(layer: int, rows: KeptRows, first: int | None = None, dtype: str | None = None) -> AttentionCsr:
    """The rows of one layer on the host; `first` is the number of their first window in the store. Raises if
    probabilities are not finite, with a remedy for the model's `dtype`."""
    kept_mass = rows.kept_mass.cpu().numpy()
    _validate_mass(layer, kept_mass, first, dtype)
    packed = rows.packed.cpu().numpy().reshape(kept_mass.size, -1)
    is_kept = packed != DROPPED
    indptr = np.zeros(kept_mass.size + 1, np.uint32)
    np.cumsum(is_kept.sum(1), out=indptr[1:])
    entries = packed[is_kept]
    return AttentionCsr(
        indptr=indptr,
        indices=(entries >> 16).astype(index_dtype(kept_mass.shape[-1])),
        data=(entries & LOW_HALF).astype(np.uint16).view(np.float16),
        kept_mass=kept_mass,
    )


def _pack_by_value(probs: Tensor) -> Tensor:
    """int32 that orders by probability, then by lower position: the float16's bits above the reversed position."""
    bits = probs.view(torch.int16).int()
    reversed_positions = LOW_HALF - torch.arange(probs.shape[-1], dtype=torch.int32, device=probs.device)
    return bits << 16 | reversed_positions


def _largest(packed: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, descending."""
    if packed.device.type == "cpu" and packed.shape[-1] <= SHORT_ROW:
        return torch.from_numpy(np.sort(packed.numpy(), axis=-1)[..., : -count - 1 : -1].copy())
    return packed.topk(count).values


def _ascending(packed: Tensor) -> Tensor:
    if packed.device.type == "cpu":
        return torch.from_numpy(np.sort(packed.numpy(), axis=-1))
    return packed.sort(-1).values


def _validate_mass(layer: int, kept_mass: np.ndarray, first: int | None, dtype: str | None) -> None:
    """Refuse rows that are not finite, because the model has overflowed."""
    is_number = np.isfinite(kept_mass)
    if not is_number.all():
        window, _, query = np.argwhere(~is_number)[0]
        raise NonFiniteAttention(
            f"layer {layer}: the attention of {name_window(window, first)}, query {query}, is not finite"
            + (f"; {say_overflow(dtype)}" if dtype else "")
        )
