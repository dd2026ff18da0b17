"""A dictionary split by latents: each process holds some of them, and sees every row of a batch.

No table is ever gathered in a step. The processes exchange:
1. the candidates of the selection (`sae/top_k_over_processes.py`), k per row and process; of a whole batch, counts;
2. the reconstruction [B, D], as the sum of what each process's latents reconstruct (`join`);
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
    """The latents of this process, starting at number `first`, out of `total`; in this base class, all of them."""

    first = 0
    is_whole = True

    def __init__(self, total: int = 0) -> None:
        self.total = total

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, without gradient."""
        return tensor

    def count(self, own: int) -> int:
        """The same for a number on the host."""
        return own

    def agree(self, tensor: Tensor) -> Tensor:
        """The first process's numbers, for decisions on which all must agree: different GPUs round differently. NaN if
        any process's is not finite."""
        return tensor

    def gather(self, tensor: Tensor) -> tuple[list[Tensor], int]:
        """The tensor of each process, in order of latents, and the index of this one's; lengths may differ."""
        return [tensor], 0

    def own(self, table: Tensor) -> Tensor:
        """This process's rows of a whole table."""
        return table

    def whole(self, table: Tensor) -> Tensor | None:
        """All rows of a split table, on the first process's host; None on the others. A collective call."""
        return table

    def join(self, part: Tensor) -> Tensor:
        """The sum over processes, which all of them then use: the gradient of each part is that of the sum."""
        return part

    def share(self, tensor: Tensor) -> Tensor:
        """A tensor that all processes hold and each one's latents read: its gradient is summed over processes."""
        return tensor


ALL_LATENTS = Latents()


class SomeLatents(Latents):
    """Some of the latents are in this process, the rest in others."""

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
        return self._ranks.sum(tensor * (self._ranks.rank == 0))

    def gather(self, tensor: Tensor) -> tuple[list[Tensor], int]:
        return self._ranks.gather(tensor), self._ranks.rank

    def own(self, table: Tensor) -> Tensor:
        return table[self.first : self.stop]

    def whole(self, table: Tensor) -> Tensor | None:
        is_bool = table.dtype == torch.bool
        own = table.cpu().view(torch.uint8) if is_bool else table.cpu()
        found = self._ranks.gather_on_first(own, [stop - start for start, stop in pairwise(self._starts)])
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
