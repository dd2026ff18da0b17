"""What an optimiser that works row by row attaches to a weight table, like `.grad` to a parameter.

A table's gradient is a sum of k B outer products; a dense one would be written only to be read again. An optimiser
that sums the entries itself attaches `RowUpdates`; entries then arrive in `table.row_updates.gradients`, and a dense
gradient in `table.grad` is added to them. It also writes the bfloat16 copy of a table if a product reads one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .sparse_products import weight_sum
from .sparse_support import Support


@dataclass(frozen=True, eq=False)
class RowGradient:
    """The sum over pairs of values[n] * rows[row n], for the row of the pair's latent."""

    support: Support
    values: Tensor  # [N]
    rows: Tensor  # [B, D]

    def table(self) -> Tensor:
        """[F, D]."""
        return weight_sum(self.support, self.values, self.rows)

    def entries(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Offsets [F + 1], latents, rows and values [N], ordered by latent."""
        turned = self.support.by_latent
        return turned.offsets, turned.latents, turned.rows, self.values[turned.order]


@dataclass(eq=False)
class RowUpdates:
    """Attached to a table whose optimiser takes entries."""

    gradients: list[RowGradient] = field(default_factory=list)
    is_low_read: bool = False  # whether a product has asked for the table in bfloat16
    low: Tensor | None = None  # bfloat16 [F, D], as the optimiser wrote it
    low_version: int = -1  # the table's version when the copy was written


def take_rows(table: nn.Parameter) -> RowUpdates:
    """From now on, have this table's gradients at a support arrive as entries."""
    updates = RowUpdates()
    table.row_updates = updates  # pyright: ignore[reportAttributeAccessIssue]
    return updates


def table_gradient(table: Tensor, support: Support, values: Tensor, rows: Tensor) -> Tensor | None:
    """The gradient of a table, or None if its optimiser takes the entries."""
    updates: RowUpdates | None = getattr(table, "row_updates", None)
    if updates is None:
        return weight_sum(support, values, rows)
    updates.gradients.append(RowGradient(support, values, rows))
    return None


def low_copy(table: Tensor) -> Tensor:
    """The table in bfloat16; the optimiser's own copy if the table has not been written to since."""
    updates: RowUpdates | None = getattr(table, "row_updates", None)
    if updates is not None:
        updates.is_low_read = True
    if updates is None or updates.low is None or updates.low_version != table._version:
        return table.to(torch.bfloat16)
    return updates.low
