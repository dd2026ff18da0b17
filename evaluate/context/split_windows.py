"""What the measures of stored text read: some windows of a split, with the layers that all SAEs need.

They look at dense codes [W, T, F] of one SAE at a time; batches are as small as the widest SAE asks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import NotApplicable
from ..model.batches import count_windows, store_batches
from ..model.windows import Windows
from .context import Context
from .loaded_sae import LoadedSae, attention_layers_of, layers_of

MOST_CODES = 1 << 27  # elements of dense codes at once: 512 MiB


def read_windows(
    context: Context,
    subjects: Sequence[LoadedSae],
    title: str,
    windows: int,
    batch_windows: int,
    split: str = "test",
    attention_layers: Sequence[int] = (),
    layers: Sequence[int] | None = None,
) -> Iterator[Windows]:
    """The first `windows` windows of a split, batch by batch, with a bar. `layers`: whose residuals come along, where
    it is not just what the SAEs need."""
    total = min(windows, count_windows(context.store, split))
    if total == 0:
        raise NotApplicable(f"the store's {split} split has no windows: harvest more text")
    layers = layers_of(subjects) if layers is None else layers
    attention = sorted({*attention_layers, *attention_layers_of(subjects)})
    length, device = context.manifest.context, context.device
    room = MOST_CODES // (length * max(subject.width for subject in subjects))
    size = max(1, min(batch_windows, total, room))
    batches = store_batches(context.store, split, layers, attention, size, count=total, device=device)
    with context.watch.stage(title, total * length) as advance:
        for batch in batches:
            yield batch
            advance(len(batch) * batch.context)
