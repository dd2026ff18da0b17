"""The processes of a run: one alone, or several that `accelerate launch` or `torchrun` started.

Each process draws the same batches and works on its share of the rows; whatever depends on the whole batch goes
through the calls of `sums_over_processes.py`. Where SAEs are spread over processes, each trains its own as if alone,
and they exchange only reports. Texts and flags go through gloo from host to host, without waiting for a GPU.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...cache_schema import StoreError
from ...cache_schema.launcher_environment import count_processes, is_launched, joining
from ..errors import ConfigInvalid, StoppedElsewhere, TrainError
from .sums_over_processes import Ranks

REST_SECONDS = 0.2
PATIENCE = timedelta(days=1)  # while one process measures or saves alone; a lost process is noticed at once
MEETING = timedelta(hours=1)  # until all have started; also for a sum on GPUs, as one may still write a checkpoint
SILENCE = timedelta(minutes=10)  # until a host counts as lost: without network or power it closes no connection
BEAT_SECONDS, GRACE_SECONDS, LEAVING_SECONDS = 1.0, 20.0, 1800.0
GONE = "another process of the run is gone, or cannot be reached: its own message says why, if it could print one"


class Group(Ranks):
    """The processes, with what a training loop needs beyond a step's sums; in this base class, a single process."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process; a collective call."""
        return flag

    def texts(self, value: str) -> list[str]:
        """The value of each process, in rank order; a collective call."""
        return [value]

    def for_another_thread(self) -> Group:
        """The same processes, for messages from another thread; a collective call."""
        return self

    def close(self) -> None:
        """Leave after everything has finished."""

    def leave(self, code: int) -> None:
        """Leave after a failure, whatever the others do."""


SOLO = Group()


class Pulse:
    """A thread that notices the loss of a process for which this one is waiting on its GPU: a sum there that cannot
    finish raises nothing, and the host blocks at the next number that it reads."""

    is_exiting = False
    """Whether this process has found out without it, and is already exiting."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=SILENCE)
        self._is_ending = False
        self._thread = threading.Thread(target=self._beat, name="saemill-pulse", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        try:
            while True:
                ending = torch.tensor([int(self._is_ending)])
                dist.all_reduce(ending, group=self._group)
                if int(ending) == dist.get_world_size():
                    return
                time.sleep(BEAT_SECONDS)
        except RuntimeError:
            time.sleep(GRACE_SECONDS)  # a process that is not blocked reports the loss, with the command to resume
            if Pulse.is_exiting:
                time.sleep(LEAVING_SECONDS)  # for a checkpoint to be finished
            said = f"error: {GONE}. Existing checkpoints are intact: sae-train --resume continues from the last"
            print(said, file=sys.stderr, flush=True)
            os._exit(1)

    def end(self) -> None:
        """Call when all have finished: from then on a process may leave unnoticed."""
        self._is_ending = True
        self._thread.join()


class Processes(Group):
    """Several processes over torch.distributed."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._host = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._pulse: Pulse | None = None
        self._for_another_thread: Processes | None = None

    def begin_pulse(self) -> None:
        """A collective call."""
        self._pulse = Pulse()

    def _group_of(self, tensor: Tensor) -> Any:
        """The group that can send a tensor: the default one for GPUs, or that of the hosts."""
        return self._host if tensor.device.type == "cpu" else None

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)  # all_reduce works in place
        with _reporting_lost_process():
            dist.all_reduce(total, group=self._group_of(total))
        return total

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        with _reporting_lost_process():
            work = dist.all_reduce(tensor, group=self._group_of(tensor), async_op=True)
        assert work is not None

        def wait() -> None:
            with _reporting_lost_process():
                work.wait()

        return wait

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Shorter tensors are padded for the transfer."""
        length = torch.tensor([len(tensor)])
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        with _reporting_lost_process():
            dist.all_gather(lengths, length, group=self._host)
        longest = int(torch.stack(lengths).max())
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with _reporting_lost_process():
            dist.all_gather(parts, padded, group=self._group_of(padded))
        return [part[: int(n)] for part, n in zip(parts, lengths, strict=True)]

    def gather_on_first(self, part: Tensor, lengths: Sequence[int]) -> Tensor | None:
        """Receive each part into its place, one at a time: only the first process holds more than its own."""
        if self.rank > 0:
            with _reporting_lost_process():
                if len(part):
                    dist.send(part.contiguous(), 0, group=self._group_of(part))
            return None
        whole = part.new_empty((sum(lengths), *part.shape[1:]))
        for rank, place in enumerate(whole.split(list(lengths))):
            if rank == 0:
                place.copy_(part)
            elif len(place):
                with _reporting_lost_process():
                    dist.recv(place, rank, group=self._group_of(place))
        return whole

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor([int(flag)])).item())

    def texts(self, value: str) -> list[str]:
        data = torch.tensor(list(value.encode()), dtype=torch.uint8)
        return [bytes(part.tolist()).decode() for part in self.gather(data)]

    def for_another_thread(self) -> Group:
        """One group for all runs of a launch: a group keeps a connection to each process until the end."""
        self._for_another_thread = self._for_another_thread or Processes()
        return self._for_another_thread

    def close(self) -> None:
        """Wait for gloo's worker threads to become idle, then leave.

        A worker frees the tensors of a finished collective after its caller has continued, and needs the interpreter
        for that. Before Python 3.14 a thread that asks for the interpreter during shutdown is killed inside C++, which
        aborts the process: a finished run exited with -6, one time in five.
        """
        if self._pulse is not None:
            self._pulse.end()
        time.sleep(REST_SECONDS)
        dist.destroy_process_group()

    def leave(self, code: int) -> None:
        """Exit when the interpreter does, after the reason is printed, but without shutting down the group.

        NCCL's shutdown waits for all processes of a machine, which wait for this one in gloo, whose connections close
        only afterwards. If the process just exits, the system closes them, and the others notice at once.
        """
        Pulse.is_exiting = True

        def end() -> None:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:  # even if the output's reader has gone
                os._exit(code)

        atexit.register(end)


@contextmanager
def _reporting_lost_process() -> Iterator[None]:
    """Report the failure of a collective call as the loss of another process."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        Pulse.is_exiting = True
        raise StoppedElsewhere(f"{GONE} (here: {' '.join(str(error).split())[:1000]})") from error


@contextmanager
def all_or_none(
    group: Group,
    kinds: tuple[type[Exception], ...] = (TrainError, StoreError),
    elsewhere: str = "another process of the run stopped with an error; its own message says what and why",
) -> Iterator[None]:
    """If one process raises inside, all do, so that none waits for a lost one. No collective calls inside."""
    failure: Exception | None = None
    try:
        yield
    except kinds as error:
        failure = error
    try:
        is_lost = group.any(failure is not None)
    except StoppedElsewhere as gone:  # the process that failed may have left already; this says only that it is gone
        raise failure or gone from None
    if is_lost:
        raise failure or StoppedElsewhere(elsewhere)


def join(device: str, has_sums: bool = True) -> tuple[Group, torch.device]:
    """This process's group and device; `auto` takes a GPU if there is one. `has_sums`: whether processes will sum
    tensors on their GPUs, which is then tried here, before any work is done and memory is measured."""
    launched = count_processes()
    if launched == 1:
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        if tasks != "1" and not is_launched():
            warnings.warn(
                f"srun started {tasks} processes, and each trains everything on its own: for one run across all of "
                "them let srun start torchrun, one per node (docs/cluster.md)",
                stacklevel=2,
            )
        return SOLO, choose_device(device)
    from accelerate import PartialState

    chosen = choose_device(device)
    if ":" in device:
        raise ConfigInvalid(
            f"expected a device without a number for {launched} processes, because each takes its own, found "
            f"{device}: use --device {chosen.type}, and choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    with joining():
        if chosen.type == "cuda":  # accelerate would set up nothing for messages between hosts
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=MEETING)
        state = PartialState(cpu=chosen.type == "cpu", timeout=MEETING)
        own_device, group = torch.device(state.device or "cpu"), Processes()
    try:
        require_one_kind(group.texts(own_device.type))
        require_own_devices(group.texts(_gpu_identity(own_device)))
        if own_device.type == "cuda":  # and so are the others', all different
            with joining():
                group.begin_pulse()
                if has_sums:
                    dist.all_reduce(torch.zeros(1, device=own_device))
                    torch.cuda.synchronize(own_device)
    except (TrainError, StoreError):
        group.leave(1)
        raise
    return group, own_device


def require_one_kind(kinds: list[str]) -> None:
    """Refuse a mix of processes with and without a GPU: their sums would never meet."""
    if len(set(kinds)) > 1:
        on_cpu = ", ".join(str(rank) for rank, kind in enumerate(kinds) if kind == "cpu")
        raise ConfigInvalid(
            f"expected a GPU for each of {len(kinds)} processes, found none for {on_cpu}: check CUDA_VISIBLE_DEVICES "
            "and the driver there, or start all with --device cpu"
        )


def require_own_devices(names: list[str]) -> None:
    """Refuse two processes on one GPU: NCCL cannot join them, and each would have half of its memory."""
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        sharing = ", ".join(str(rank) for rank, name in enumerate(names) if name == twice[0])
        raise ConfigInvalid(
            f"expected a GPU for each of {len(names)} processes, found processes {sharing} on one ({twice[0]}): "
            "start at most one process per GPU of a machine, or use --device cpu"
        )


def _gpu_identity(device: torch.device) -> str:
    """A name that identifies a GPU across processes; empty for a CPU."""
    if device.type != "cuda":
        return ""
    return f"{torch.cuda.get_device_name(device)}, {torch.cuda.get_device_properties(device).uuid}"


COMPUTED_ON = ("cpu", "cuda")
"""Supported device types: activations are read into memory that NumPy shares."""


def choose_device(name: str) -> torch.device:
    """The device, with its number if it is a GPU: threads that read for it must make it their current one."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise ConfigInvalid(f"expected a device like auto, cpu, cuda or cuda:1, found {name!r}") from None
    if device.type not in COMPUTED_ON:
        raise ConfigInvalid(f"expected --device auto, cpu or a CUDA device, found {name!r}: it is not supported")
    found = torch.get_device_module(device.type).device_count()
    if (device.index or 0) >= found:
        raise ConfigInvalid(
            f"expected device {name}, found {found or 'no'} {device.type.upper()} device{'s' * (found > 1)} "
            f"with torch {torch.__version__}: choose another --device, or auto"
        )
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
