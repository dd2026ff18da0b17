"""What data parallelism needs from its processes, and the case of a single one.

Every rank sees its own rows of one global batch. Whatever depends on the whole batch (gradients, the
batch top-k, firing counts, normalisers) goes through these calls, so one process and many compute
the same step.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """The processes of a run."""

    @property
    def size(self) -> int: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks; may change `tensor` in place."""
        ...

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks; may change `tensor` in place."""
        ...

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks one after the other, in rank order; lengths may differ."""
        ...


class Alone:
    """One process."""

    size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor
