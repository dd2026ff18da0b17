"""Several one-thread processes that train one model: gradients averaged, one clock.

On a few busy cores this beats threads by far: processes meet once a step, threads
in every operation, and waiting for each other there costs most of the time.
Process 0 is the one that was started; stopping it (SIGSTOP) pauses all.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = timedelta(hours=12)  # a paused partner is not a dead one


@dataclass(frozen=True)
class Team:
    rank: int = 0
    size: int = 1

    def average_(self, values: torch.Tensor) -> None:
        """The mean over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size

    def agree(self, value: float) -> float:
        """Process 0's value, for all."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return shared.item()


@contextmanager
def working_team(size: int, meeting: Path, partner: Callable[..., None], *args: Any) -> Iterator[Team]:
    """Start `partner(team, *args)` in size - 1 processes; yields process 0's own Team.

    The processes find each other by the file `meeting`; one left by a killed run is removed.
    """
    if size == 1:
        yield Team()
        return
    meeting.unlink(missing_ok=True)
    context = mp.get_context("spawn")
    others = [
        context.Process(target=_partner, args=(rank, size, meeting, partner, args), daemon=True)
        for rank in range(1, size)
    ]
    for process in others:
        process.start()
    _join(0, size, meeting)
    try:
        yield Team(0, size)
    finally:
        dist.destroy_process_group()
        for process in others:
            process.join(timeout=10)
        meeting.unlink(missing_ok=True)


def _partner(rank: int, size: int, meeting: Path, partner: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    _join(rank, size, meeting)
    partner(Team(rank, size), *args)
    dist.destroy_process_group()


def _join(rank: int, size: int, meeting: Path) -> None:
    if sys.platform == "linux":  # the team lives on one machine, whose host name need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting.resolve()}", rank=rank, world_size=size, timeout=PATIENCE
    )
