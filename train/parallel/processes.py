"""The processes of a run: one alone, or several that `accelerate launch` or `torchrun` started.

Each process draws the same batches and works on its share of the rows; what depends on the whole batch
goes through the calls of `ranks.py`. Only rank 0 writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...cache_schema import StoreError
from ..errors import ConfigInvalid, StoppedElsewhere, TrainError
from .ranks import Alone, Ranks
from .sharded_rows import Shard

_REST_SECONDS = 0.2


class Group(Ranks, Protocol):
    """The processes, and what a loop needs of them beyond a step's sums."""

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process; a collective call."""
        ...

    def text(self, value: str) -> str:
        """The value of rank 0; a collective call."""
        ...

    def close(self) -> None: ...


class Solo(Alone):
    """One process."""

    def any(self, flag: bool) -> bool:
        return flag

    def text(self, value: str) -> str:
        return value

    def close(self) -> None:
        pass


class Processes:
    """Several processes over torch.distributed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)  # all_reduce works in place
        dist.all_reduce(total)
        return total

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Shorter tensors are padded while they are sent."""
        length = torch.tensor([len(tensor)], device=self._device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        longest = int(torch.stack(lengths).max())
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [part[: int(n)] for part, n in zip(parts, lengths, strict=True)]

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor([int(flag)], device=self._device)).item())

    def text(self, value: str) -> str:
        data = torch.tensor(list(value.encode()), dtype=torch.uint8, device=self._device)
        length = torch.tensor([len(data)], device=self._device)
        dist.broadcast(length, 0)
        if self.rank != 0:
            data = torch.empty(int(length), dtype=torch.uint8, device=self._device)
        dist.broadcast(data, 0)
        return bytes(data.tolist()).decode()

    def close(self) -> None:
        """Let gloo's worker threads come to rest first, and leave.

        A worker drops the tensors of a finished collective after its caller has gone on, and needs the
        interpreter for it. Before Python 3.14 a thread that asks for one that is shutting down is ended in the
        middle of C++, which aborts the process: a finished run exited with -6, one time in five. No collective
        here: this is also the way out of a process whose peers have failed.
        """
        time.sleep(_REST_SECONDS)
        dist.destroy_process_group()


@contextmanager
def all_or_none(group: Group) -> Iterator[None]:
    """If one process raises inside, all do: none waits for one that has gone. No collective calls inside."""
    refusal: TrainError | StoreError | None = None
    try:
        yield
    except (TrainError, StoreError) as error:
        refusal = error
    if not group.any(refusal is not None):
        return
    raise refusal or StoppedElsewhere(
        "another process of the run stopped with an error; its own message says what and why"
    )


def join(device: str) -> tuple[Group, torch.device]:
    """This process's group and device; `auto` takes an accelerator where there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Solo(), choose_device(device)
    from accelerate import PartialState

    state = PartialState(cpu=choose_device(device).type == "cpu")
    place = torch.device(state.device or "cpu")
    return Processes(place), place


def make_shard(device: torch.device) -> Shard:
    """Deal out the rows of all parameters over the processes (FSDP)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    def shard(module: nn.Module) -> None:
        fully_shard(module, mesh=mesh, reshard_after_forward=False)

    return shard


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigInvalid(f"expected a device like auto, cpu, cuda or cuda:1, found {name!r}") from None
    found = _count_devices(device.type)
    if (device.index or 0) >= found:
        raise ConfigInvalid(
            f"device {name} was asked for, but torch {torch.__version__} finds {found or 'no'} "
            f"{device.type.upper()} device{'s' * (found > 1)} here: choose another --device, or auto"
        )
    return device


def _count_devices(kind: str) -> int:
    try:
        return torch.get_device_module(kind).device_count()
    except RuntimeError:  # a kind without a module, such as meta, computes nothing
        return 0
