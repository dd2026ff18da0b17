"""What measures of stored text read: some windows of a split with the layers that all SAEs need, and which rows count.

They look at dense codes [W, T, F] of one SAE at a time; batches are as small as the widest SAE asks for. Rows that
count are neither special nor padding, nor massive in a layer that the SAE reads or writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...cache_schema.sites import Place
from ..errors import NotApplicable, SettingInvalid
from ..model.batches import Windows, count_windows, store_batches
from .context import Context
from .loaded_sae import LoadedSae, attention_layers_of, batch_size_for, is_massive, layers_of


def read_windows(
    context: Context,
    subjects: Sequence[LoadedSae],
    title: str,
    windows: int,
    batch_windows: int,
    split: str = "test",
    attention_layers: Sequence[int] = (),
    layers: Sequence[int] | None = None,
    first: int = 0,
) -> Iterator[Windows]:
    """The first `windows` windows of a split, batch by batch, with a bar. `layers`: whose residuals come along, where
    it is not just what the SAEs need. `first`: so many of them, whole batches, were read before."""
    require_some(windows)
    total = min(windows, count_windows(context.store, split))
    if total == 0:
        raise NotApplicable(f"the store's {split} split has no windows: harvest more text")
    layers = layers_of(subjects) if layers is None else layers
    attention = sorted({*attention_layers, *attention_layers_of(subjects)})
    length, device = context.manifest.context, context.device
    size = batch_size_for(subjects, length, min(batch_windows, total))
    batches = store_batches(context.store, split, layers, attention, size, first, total - first, device)
    with context.watch.stage(title, total * length) as advance:
        advance.reach(first * length)
        for batch in batches:
            yield batch
            advance(len(batch) * batch.context)


def require_some(windows: int) -> None:
    """Else it would seem that the store has none."""
    if windows < 1:
        raise SettingInvalid(f"windows: expected at least 1 to be read, found {windows}")


def sums_of_codes(
    context: Context,
    subjects: Sequence[LoadedSae],
    title: str,
    windows: int,
    batch_windows: int,
    of_rows: Callable[[Tensor], Tensor],
) -> dict[LoadedSae, Tensor]:
    """What `of_rows` gives of an SAE's codes [N, F], added up over the rows that count of the first windows: by it
    latents are chosen that are the same however large batches are."""
    sums: dict[LoadedSae, Tensor] = {}
    for batch in read_windows(context, subjects, title, windows, batch_windows):
        for subject in subjects:
            found = of_rows(subject.encode(batch)[ordinary_rows(context, subject, batch)])
            sums[subject] = sums[subject] + found if subject in sums else found
    return sums


def mean_of_rows(context: Context, layer: int) -> Tensor:
    """float64 [D]: the mean of a layer that the store holds, over the rows that count."""
    found = context.massive(layer)
    moments = found.ordinary if found is not None and found.massive else context.store.moments(layer)
    return torch.from_numpy(moments.mean)


def ordinary_rows(context: Context, subject: LoadedSae, batch: Windows) -> Tensor:
    """bool [W, T]: those of `batch.keep` that are massive in no layer that the SAE reads or writes."""
    return without_massive(context, batch.keep, {layer: batch.resid[layer] for layer in layers_of([subject])})


def without_massive(context: Context, rows_WT: Tensor, acts: Mapping[Place, Tensor]) -> Tensor:
    """bool [W, T]: those rows whose norm is within the bound that training has for this store, at all these places."""
    for place, acts_WTD in acts.items():
        found = context.massive(place)
        if found is not None:
            norms = torch.linalg.vector_norm(acts_WTD, dim=-1, dtype=torch.float32)
            rows_WT = rows_WT & ~is_massive(norms, found.bound)
    return rows_WT
