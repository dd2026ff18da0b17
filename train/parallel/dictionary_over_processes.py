"""A dictionary that is split by latents: each process holds some of them, and sees every row of a batch.

No table is ever gathered in a step. What goes between the processes:
1. the candidates of the selection (`sae/top_k_over_processes.py`), k of each row and process;
2. the reconstruction [B, D], as the sum of what each process's latents rebuild (`join`);
3. one gradient of the width of a residual (`share`), and numbers.
"""

# pyright: reportIncompatibleMethodOverride=false
# (`once_differentiable` makes ctx positional, which the stub of Function.backward does not foresee)

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .sums_over_processes import Ranks


class Latents:
    """The latents of this process, of `total` in all, from number `first` on: here all of them are."""

    first = 0
    is_whole = True

    def __init__(self, total: int = 0) -> None:
        self.total = total

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all processes, without gradient."""
        return tensor

    def count(self, own: int) -> int:
        """The same of a number on the host."""
        return own

    def agree(self, tensor: Tensor) -> Tensor:
        """The first process's numbers, where all are to decide by the same: unlike GPUs round unlike."""
        return tensor

    def gather(self, tensor: Tensor) -> tuple[list[Tensor], int]:
        """The tensor of each process, in the order of their latents, and which is this one's; lengths may differ."""
        return [tensor], 0

    def own(self, table: Tensor) -> Tensor:
        """This process's rows of a whole table."""
        return table

    def whole(self, table: Tensor) -> Tensor | None:
        """All rows of a table of which each process has some, on the first one's host alone; a collective call."""
        return table

    def join(self, part: Tensor) -> Tensor:
        """The sum over processes of what all of them go on with alike: the gradient of each part is the sum's."""
        return part

    def share(self, tensor: Tensor) -> Tensor:
        """What all hold alike, for this process's latents to read: its gradient is the sum over processes."""
        return tensor


ALL_LATENTS = Latents()


class SomeLatents(Latents):
    """Some latents are here, the others in other processes."""

    is_whole = False

    def __init__(self, ranks: Ranks, total: int) -> None:
        super().__init__(total)
        self._ranks = ranks
        self._starts = [total * rank // ranks.size for rank in range(ranks.size + 1)]
        self.first, self.stop = self._starts[ranks.rank : ranks.rank + 2]

    def sum(self, tensor: Tensor) -> Tensor:
        return self._ranks.sum(tensor)

    def count(self, own: int) -> int:
        return int(self._ranks.sum(torch.tensor(own)))

    def agree(self, tensor: Tensor) -> Tensor:
        return self._ranks.sum(tensor if self._ranks.rank == 0 else torch.zeros_like(tensor))

    def gather(self, tensor: Tensor) -> tuple[list[Tensor], int]:
        return self._ranks.gather(tensor), self._ranks.rank

    def own(self, table: Tensor) -> Tensor:
        return table[self.first : self.stop]

    def whole(self, table: Tensor) -> Tensor | None:
        is_bool = table.dtype == torch.bool
        own = table.cpu().view(torch.uint8) if is_bool else table.cpu()
        found = self._ranks.bring(own, [stop - start for start, stop in pairwise(self._starts)])
        return found if found is None or not is_bool else found.view(torch.bool)

    def join(self, part: Tensor) -> Tensor:
        return _Join.apply(part, self._ranks)

    def share(self, tensor: Tensor) -> Tensor:
        shared = tensor.view_as(tensor)
        if shared.requires_grad:
            shared.register_hook(self._ranks.sum)
        return shared


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
