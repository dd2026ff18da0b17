"""Reading stored text: windows of a split, with the layers that all SAEs need, and which of their rows count.

Measures take dense codes [W, T, F] of one SAE at a time; batches are small enough for the widest SAE. Rows that count
are neither special nor padding, nor massive in a layer that the SAE reads or writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...cache_schema.massive_activations import is_massive
from ...cache_schema.numbers_in_words import counted
from ...cache_schema.sites import Place, key_of, say_place, site_of
from ..errors import NotApplicable, SettingInvalid
from ..model.batches import Windows, count_windows, store_batches
from .context import Context
from .loaded_sae import LoadedSae, attention_layers_of, batch_size_for, layers_of


@dataclass
class TextCount:
    """How much text an SAE was measured on, added up batch by batch; as a string, for its result."""

    split: str = "test"
    windows: int = 0
    tokens: int = 0
    massive: int = 0

    def add(self, batch: Windows, rows_WT: Tensor) -> None:
        """Add a batch; `rows_WT` says which of its tokens count."""
        self.windows += len(batch)
        self.tokens += int(rows_WT.sum())
        self.massive += int((batch.keep & ~rows_WT).sum())

    def __str__(self) -> str:
        text = f"{self.split} split, {counted(self.tokens, 'token')} of {counted(self.windows, 'window')}"
        return f"{text}, {counted(self.massive, 'massive row')} left out" if self.massive else text

    def and_traced(self, windows: int) -> str:
        """The same, with the number of windows that latents were traced in, `windows` at most."""
        traced = min(windows, self.windows)
        return f"{self}; traced in {counted(traced, 'window')}" if traced > 0 else str(self)


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
    """The first `windows` windows of a split, batch by batch, with a progress bar. `layers`: whose residuals are read;
    by default those that the SAEs need. `first`: how many of the windows, in whole batches, were read before."""
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
    """Refuse to read no windows, which would look as if the store had none."""
    if windows < 1:
        raise SettingInvalid(f"windows: expected at least 1 to be read, found {windows}")


def windows_by_split(
    context: Context, title: str, windows: int, splits: Sequence[str], is_default: bool
) -> dict[str, int]:
    """How many windows to read from each split, from one after the other. Says so if there are fewer than the user
    asked for."""
    require_some(windows)
    left, found = windows, dict[str, int]()
    for split in dict.fromkeys(splits):  # a split named twice is read once
        found[split] = min(left, count_windows(context.store, split))
        left -= found[split]
    if not any(found.values()):
        raise NotApplicable(f"the store's splits {', '.join(splits)} have no windows: harvest more text")
    if left > 0 and not is_default:
        has = f"{', '.join(found)} have {sum(found.values()):,}"
        context.say(f"{title}: asked for {windows:,} windows, but {has}: all are read")
    return {split: count for split, count in found.items() if count}


def say_splits(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def say_if_fewer(context: Context, title: str, config: Any, split: str = "test") -> None:
    """Say so if more windows were requested than the split has. A default may exceed that silently."""
    there = count_windows(context.store, split)
    if there < config.windows != type(config)().windows:
        context.say(f"{title}: asked for {config.windows:,} windows, but the {split} split has {there:,}: all are read")


def sums_of_codes(
    context: Context,
    subjects: Sequence[LoadedSae],
    title: str,
    windows: int,
    batch_windows: int,
    of_rows: Callable[[Tensor], Tensor],
) -> dict[LoadedSae, tuple[Tensor, TextCount]]:
    """What `of_rows` returns for an SAE's codes [N, F], summed over the rows that count in the first windows, so that
    latents chosen by it do not depend on the batch size; and the amount of text."""
    sums: dict[LoadedSae, Tensor] = {}
    texts = {subject: TextCount() for subject in subjects}
    for batch in read_windows(context, subjects, title, windows, batch_windows):
        for subject in subjects:
            rows = ordinary_rows(context, subject, batch)
            texts[subject].add(batch, rows)
            found = of_rows(subject.encode(batch)[rows])
            sums[subject] = sums[subject] + found if subject in sums else found
    return {subject: (total, texts[subject]) for subject, total in sums.items()}


def mean_of_rows(context: Context, layer: int) -> Tensor:
    """float64 [D]: the mean of a layer that the store holds, over the rows that count."""
    found = context.massive(layer)
    moments = found.ordinary if found is not None and found.massive else context.store.moments(layer)
    return torch.from_numpy(moments.mean)


def ordinary_rows(context: Context, subject: LoadedSae, batch: Windows) -> Tensor:
    """bool [W, T]: the rows in `batch.keep` that are massive in no layer that the SAE reads or writes."""
    acts: dict[Place, Tensor] = {layer: batch.resid[layer] for layer in layers_of([subject])}
    return without_massive(context, batch.keep, acts, subject.bounds)


def without_massive(
    context: Context, rows_WT: Tensor, acts: Mapping[Place, Tensor], own: Mapping[str, float] | None = None
) -> Tensor:
    """bool [W, T]: the rows whose norm is within the bounds that training has for this store, at all these places. For
    places that the store does not hold, the bounds that the SAE was trained with apply (`own`)."""
    for place, acts_WTD in acts.items():
        bound = _bound_of(context, place, own or {})
        if bound is not None:
            norms = torch.linalg.vector_norm(acts_WTD, dim=-1, dtype=torch.float32)
            rows_WT = rows_WT & ~is_massive(norms, bound)
    return rows_WT


def tell_bounds(context: Context, subject: LoadedSae, places: Sequence[Place]) -> str | None:
    """The remark on a result whose settings name a multiple, for places whose massive rows the store does not show."""
    if context.massive_multiple is None:
        return None
    bounded, unbounded = list[str](), list[str]()
    for place in places:
        if site_of(place) not in context.manifest.sites:
            (unbounded if _bound_of(context, place, subject.bounds) is None else bounded).append(say_place(place))
    cases = ((bounded, "the bound is that of the SAE's training"), (unbounded, "none is left out there"))
    remarks = [f"massive rows of {', '.join(names)}, not held by the store: {what}" for names, what in cases if names]
    return "; ".join(remarks) or None


def _bound_of(context: Context, place: Place, own: Mapping[str, float]) -> float | None:
    """The norm beyond which a row is massive; None if every row counts, or if the bound is unknown."""
    if context.massive_multiple is None:
        return None
    found = context.massive(place)
    return own.get(key_of(place)) if found is None else found.bound
