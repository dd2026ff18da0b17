"""What an SAE reads from the store, and the batch that it gets.

B rows, W windows, T context, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor


class Kind(NamedTuple):
    """What SAEs that draw the same rows have in common."""

    windows: bool  # whole windows, or tokens one by one
    layers: tuple[int, ...]  # whose massive rows are left out


@dataclass(frozen=True)
class Needs:
    """What a variant reads from the store.

    A row holds the activations of `inputs` side by side; the target those of `targets`, or the row
    itself. With `windows` the rows are those of whole windows, special tokens left out, and the side
    inputs `window` [B], `position` [B] and `row_of` [W, T] (-1 where there is no row) say which.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...] | None = None
    attention_layers: tuple[int, ...] = ()
    tokens: bool = False
    documents: bool = False
    positions: bool = False
    windows: bool = False
    least_windows: int = 1
    """In a batch, where whole windows are read."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer whose activations are read, in rising order."""
        return tuple(sorted(set(self.inputs) | set(self.targets or ())))

    def kind(self, bounded: Container[int]) -> Kind:
        """The kind of rows, where massive ones of the `bounded` layers are left out."""
        return Kind(self.windows, tuple(layer for layer in self.layers if layer in bounded))


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of scaled activations, float32, on the SAE's device. B rows."""

    x: Tensor  # [B, D_in]
    target: Tensor | None = None  # [B, D_out], x itself without
    side: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Rows:
    """Which tokens of a block make up a batch; for the host, and the same on the device."""

    places: np.ndarray  # int64 [B], flat places in the block
    places_there: Tensor
    windows: np.ndarray | None = None  # int64 [W], numbers in the block, where whole windows are drawn
    windows_there: Tensor | None = None
    sizes_there: Tensor | None = None  # int64 [W], how many of the rows are each window's


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """Attention of a batch of windows on the device; rows are (window, head, query), see the store's format."""

    indptr: Tensor  # int64 [W * H * T + 1]
    indices: Tensor  # int64 [entries], key position in the window
    data: Tensor  # float32 [entries]
    kept_mass: Tensor  # float32 [W, H, T]
