"""This process among those that harvest together: its share and its device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..cache_schema.launcher_environment import count_processes, joining
from .config import Worker
from .errors import SettingInvalid
from .model.load_and_truncate import find_device


@dataclass(frozen=True)
class Process:
    """One of the processes."""

    device: torch.device
    worker: Worker
    speaks: bool = True  # only the first of a launch, because its processes share a terminal
    takes_rest: bool = False  # whether it helps with other workers' shards after its share

    @property
    def is_first(self) -> bool:
        """Whether this process writes the tokens for all."""
        return self.worker.index == 0


@contextmanager
def open_process(device: str, worker: Worker) -> Iterator[Process]:
    """The share that a launcher gave this process, combined with the one given by --worker.

    Workers with a --worker share help with each other's shards: unlike processes of one launch, some may never start.
    """
    takes_rest = worker.count > 1
    launched = count_processes()
    if launched == 1:
        yield Process(find_device(device), worker, takes_rest=takes_rest)
        return
    if ":" in device:
        raise SettingInvalid(
            f"--device {device}: each process of a launch uses the device of its rank. Leave out the number"
        )
    from accelerate import PartialState

    # Without a GPU, PartialState takes each process for the only one unless cpu=True.
    is_on_cpu = device == "cpu" or not torch.cuda.is_available()
    with joining():
        if not is_on_cpu:  # nothing is summed, and NCCL, the default, would keep polling for processes that have exited
            dist.init_process_group("gloo")
        state = PartialState(cpu=is_on_cpu)
    try:
        if state.num_processes != launched:
            raise SettingInvalid(
                f"expected RANK and LOCAL_RANK next to WORLD_SIZE={launched}, as torchrun sets them, found at most "
                "one of them. Start with torchrun, or start each process by hand with --worker I/N and no "
                "WORLD_SIZE"
            )
        index = worker.index * state.num_processes + state.process_index
        given = find_device(str(state.device))
        if device not in ("auto", given.type):
            raise SettingInvalid(
                f"--device {device}: the launch gave this process {given.type}. "
                "Check CUDA_VISIBLE_DEVICES and the launcher's options, or use --device auto"
            )
        shared = Worker(index, worker.count * state.num_processes)
        yield Process(given, shared, speaks=state.process_index == 0, takes_rest=takes_rest)
    finally:
        state.destroy_process_group()
