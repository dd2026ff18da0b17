"""What data parallelism needs from its processes, and the case of a single one.

Each rank has its own rows of one global batch, and numbers of rows may differ. Whatever depends on the
whole batch (gradients, the batch top-k, firing counts, normalisers) goes through these calls, so one
process and many compute the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """The processes of a run. Every process makes the same calls in the same order; arguments are left unchanged."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, without gradient."""
        ...

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        """The sum in the tensor itself, under way when this returns; what is returned waits for it."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each rank, in rank order; lengths may differ."""
        ...


class BatchRanks(Ranks, Protocol):
    """The processes during one step, weighted by how many rows each has."""

    @property
    def weight(self) -> float:
        """This rank's rows over the mean of all ranks' rows."""
        ...

    def rows(self, own: int) -> int:
        """Rows of the global batch, of which `own` are this rank's."""
        ...

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all rows, from each rank's mean over its own rows."""
        ...

    def share(self, count: Tensor) -> Tensor:
        """The divisor of this rank's sum: the weighted mean over ranks of the quotients is total / count."""
        ...


class Alone:
    """One process."""

    rank = 0
    size = 1
    weight = 1.0

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        return lambda: None

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def rows(self, own: int) -> int:
        return own

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor

    def share(self, count: Tensor) -> Tensor:
        return count.clamp_min(1)


class Shares:
    """Several processes, and how the rows of one batch are shared out among them."""

    def __init__(self, ranks: Ranks, own: int) -> None:
        self._ranks, self._own = ranks, own
        self.rank, self.size = ranks.rank, ranks.size
        self._rows = int(ranks.sum(torch.tensor([own])))  # from host to host: no device is waited for
        self.weight = own * self.size / self._rows

    def sum(self, tensor: Tensor) -> Tensor:
        return self._ranks.sum(tensor)

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        return self._ranks.begin_sum(tensor)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return self._ranks.gather(tensor)

    def rows(self, own: int) -> int:
        assert own == self._own, "shares are of the rows of one batch"
        return self._rows

    def mean(self, tensor: Tensor) -> Tensor:
        return self._ranks.sum(tensor.detach() * self.weight) / self.size

    def share(self, count: Tensor) -> Tensor:
        return self._ranks.sum(count).clamp_min(1) * self.weight / self.size


def share_batch(ranks: Ranks, own: int) -> BatchRanks:
    """The ranks of a step in which this one has `own` rows."""
    return Shares(ranks, own) if ranks.size > 1 else Alone()
