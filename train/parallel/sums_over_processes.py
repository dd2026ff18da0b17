"""What data parallelism needs from its processes, and the case of a single one.

Each rank has its own rows of one global batch; numbers of rows may differ. Whatever depends on the whole batch
(gradients, the batch top-k, firing counts, normalisers) goes through these calls, so one process and many compute the
same step.

`Reduction` sums a step's gradients over ranks during its backward pass. A large table is summed in place and as soon
as its gradient is complete: the decoder's is sent while the encoder's is computed. Small parameters share a buffer.
All ranks send in the same order, whatever order their gradients arrive in, so they never wait for different ones; and
sums of the same buffers give the same bits each time, on GPUs that are connected in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn


class Ranks:
    """The processes of a run; in this base class, a single one. Every process makes the same calls in the same order.
    Only `begin_sum` changes its argument."""

    rank = 0
    size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, without gradient."""
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Start summing into the tensor itself; the returned function waits for the result."""
        return lambda: None

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each rank, in rank order; lengths may differ."""
        return [tensor]

    def gather_on_first(self, part: Tensor, lengths: Sequence[int]) -> Tensor | None:
        """On the first rank, the concatenated parts of all ranks, which have these lengths; None on the others."""
        return part


ONE_PROCESS = Ranks()


class BatchRanks:
    """The processes during one step, weighted by their numbers of rows, with a step's collective calls."""

    weight = 1.0
    """This rank's number of rows over the mean of all ranks'."""

    def __init__(self, ranks: Ranks) -> None:
        self.rank, self.size, self.sum, self.gather = ranks.rank, ranks.size, ranks.sum, ranks.gather

    def rows(self, own: int) -> int:
        """Number of rows of the global batch, `own` of which are this rank's."""
        return own

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all rows, from each rank's mean over its own rows."""
        return tensor

    def share(self, count: Tensor) -> Tensor:
        """The divisor for this rank's sum, so that the weighted mean over ranks of the quotients is total / count."""
        return count.clamp_min(1)


ALONE = BatchRanks(ONE_PROCESS)


class Shares(BatchRanks):
    """Several processes, and how the rows of one batch are divided among them."""

    def __init__(self, ranks: Ranks, own: int) -> None:
        super().__init__(ranks)
        self._own = own
        self._rows = int(self.sum(torch.tensor([own])))  # from host to host, without waiting for a device
        self.weight = own * self.size / self._rows

    def rows(self, own: int) -> int:
        assert own == self._own, "shares are of the rows of one batch"
        return self._rows

    def mean(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor.detach() * self.weight) / self.size

    def share(self, count: Tensor) -> Tensor:
        return self.sum(count).clamp_min(1) * self.weight / self.size


def share_batch(ranks: Ranks, own: int) -> BatchRanks:
    """The ranks of a step in which this one has `own` rows."""
    return Shares(ranks, own) if ranks.size > 1 else ALONE


BUCKET_BYTES = 25 * 2**20


class Reduction:
    """Registers hooks on the parameters; call `begin` before and `finish` after each backward pass."""

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        self._ranks = ranks
        self._buckets = _deal(list(parameters))
        self._bucket_of = {p: at for at, bucket in enumerate(self._buckets) for p in bucket}
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._take)
        self.begin()

    def begin(self) -> None:
        """Call before a backward pass."""
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent = 0
        self._in_flight: list[tuple[list[nn.Parameter], Tensor, Callable[[], None]]] = []

    def finish(self) -> None:
        """Call after the backward pass: every gradient becomes the sum over ranks."""
        self._send(is_last=True)
        for parameters, flat, wait in self._in_flight:
            wait()
            if len(parameters) > 1:
                for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                    parameter.grad = part.view_as(parameter)
        self._in_flight.clear()

    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        self._missing[self._bucket_of[parameter]] -= 1
        self._send(is_last=False)

    def _send(self, is_last: bool) -> None:
        """Send the next buckets that are complete; in the end all of them, without parameters that have no gradient."""
        while self._sent < len(self._buckets) and (is_last or not self._missing[self._sent]):
            parameters = [p for p in self._buckets[self._sent] if p.grad is not None]
            self._sent += 1
            if parameters:
                flat = _flat(parameters)
                self._in_flight.append((parameters, flat, self._ranks.begin_sum(flat)))


def _deal(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Large tables one by one, last first, as their gradients arrive; then small ones, whose order is arbitrary."""
    large = [p for p in reversed(parameters) if p.numel() * p.element_size() >= BUCKET_BYTES]
    buckets, size = [[p] for p in large], BUCKET_BYTES
    for parameter in parameters:
        own = parameter.numel() * parameter.element_size()
        if own >= BUCKET_BYTES:
            continue
        if size + own > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += own
    return buckets


def _flat(parameters: list[nn.Parameter]) -> Tensor:
    """The gradients, concatenated; for a single parameter the gradient itself."""
    gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
    if len(gradients) > 1:
        return torch.cat([gradient.reshape(-1) for gradient in gradients])
    parameters[0].grad = gradients[0].contiguous()
    return parameters[0].grad
