"""What an SAE reads from the store, and the batches it gets.

B rows, W windows, T context, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...cache_schema.sites import RESID, Place, place_of, site_of


class Kind(NamedTuple):
    """What SAEs that draw the same rows share."""

    windows: bool  # whole windows, or tokens one by one
    layers: tuple[Place, ...]  # the layers whose massive rows are left out


@dataclass(frozen=True)
class Needs:
    """What a variant reads from the store, and which part of it is input, target or side input.

    The store's `Request` names arrays of some windows and knows nothing about SAEs: `joint_request` (`batch_stream.py`)
    makes one from the needs of all SAEs of a run, so that what they share is read once.

    A row holds the activations of layers `inputs` side by side; the target those of `targets`, or the row
    itself. `hook` is what to read in these layers, `to_hook` what to read in the target layers if that differs.
    With `windows` the rows are those of whole windows, without special tokens, and the side inputs
    `window` [B], `position` [B] and `row_of` [W, T] (-1 where there is no row, or a massive one) locate them.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...] | None = None
    attention_layers: tuple[int, ...] = ()
    tokens: bool = False
    documents: bool = False
    positions: bool = False
    windows: bool = False
    least_windows: int = 1
    """Smallest number of windows in a batch, if whole windows are read."""
    hook: str = RESID
    to_hook: str | None = None

    @property
    def input_places(self) -> tuple[Place, ...]:
        return tuple(place_of(self.hook, layer) for layer in self.inputs)

    @property
    def target_places(self) -> tuple[Place, ...]:
        """The places of the target; those of the input if there is no other target."""
        if self.targets is None:
            return self.input_places
        return tuple(place_of(self.to_hook or self.hook, layer) for layer in self.targets)

    @property
    def layers(self) -> tuple[Place, ...]:
        """Every place whose activations are read, by hook and ascending layer."""
        return tuple(sorted({*self.input_places, *self.target_places}, key=site_of))

    def kind(self, bounded: Container[Place]) -> Kind:
        """The kind of rows, with massive ones of the `bounded` layers left out."""
        return Kind(self.windows, tuple(layer for layer in self.layers if layer in bounded))


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of scaled activations, float32, on the SAE's device. B rows."""

    x: Tensor  # [B, D_in]
    target: Tensor | None = None  # [B, D_out]; None: x itself
    side: Mapping[str, Any] = field(default_factory=dict)  # tensors, and the attention of each layer

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed, say moved to another device."""
        target = None if self.target is None else change(self.target)
        return Batch(change(self.x), target, {name: _map(value, change) for name, value in self.side.items()})

    def tensors(self) -> list[Tensor]:
        """Every tensor, always in the same order."""
        found: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(collect)
        return found


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Mapping):
        return {name: _map(part, change) for name, part in value.items()}
    return value.map(change) if isinstance(value, AttentionRows) else change(value)


@dataclass(frozen=True, eq=False)
class Rows:
    """Which tokens of a block make up a batch, on the host and on the device."""

    places: np.ndarray  # int64 [B], flat places in the block
    places_on_device: Tensor
    windows: np.ndarray | None = None  # int64 [W], indices in the block, if whole windows are drawn
    windows_on_device: Tensor | None = None
    sizes_on_device: Tensor | None = None  # int64 [W], the number of rows of each window


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """Attention of a batch of windows on the device; rows are (window, head, query), see the store's format."""

    indptr: Tensor  # int64 [W * H * T + 1]
    indices: Tensor  # int64 [entries], key position in the window
    data: Tensor  # float32 [entries]
    kept_mass: Tensor  # float32 [W, H, T]

    def map(self, change: Callable[[Tensor], Tensor]) -> AttentionRows:
        return AttentionRows(change(self.indptr), change(self.indices), change(self.data), change(self.kept_mass))

    def padded(self, room: int) -> AttentionRows:
        """The same rows with `room` entries: those added have no weight, go to position 0, and are evenly spread."""
        rows, entries = len(self.indptr) - 1, len(self.indices)
        added = torch.arange(rows + 1, device=self.indptr.device) * (room - entries) // rows  # before each row
        place = torch.arange(entries, device=added.device)
        place += added[:-1].repeat_interleave(self.indptr.diff(), output_size=entries)
        indices, data = (column.new_zeros(room).index_copy_(0, place, column) for column in (self.indices, self.data))
        return AttentionRows(self.indptr + added, indices, data, self.kept_mass)


def rounded_up(count: int) -> int:
    """One of few sizes, at most an eighth more: what a GPU recorded of a step serves tensors of one size."""
    step = 1 << max(count.bit_length() - 4, 0)
    return -(-count // step) * step
