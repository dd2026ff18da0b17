"""A step's launches, recorded once on a GPU and replayed as one.

At 16,384 latents the host takes as long to launch a step's two hundred kernels as a GPU takes for them; a CUDA graph
is one launch. It does again exactly what was recorded, on the same memory, so a step is recorded only where the host
decides nothing but what its key holds: shapes, weights of terms, knobs, the number of dead latents. A term is a
function of its view, so what else could differ is what the host draws or counts, and that is refused: such an SAE,
one that reads side inputs and one that shares its rows or latents with other processes is launched step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.device_copies import NotRecordable

Measured = dict[str, Tensor]  # what a step tells: scalars by name
Work = Callable[[Batch], Measured]

RECORDS = {"cuda"}  # kinds of devices whose launches can be recorded
SETTLED = 2  # steps with one key before it is recorded, twice as many after each recording that hardly served
SERVED_WELL = 8  # steps


class Replays:
    """The recording of one SAE's step, for as long as it holds."""

    def __init__(self, is_possible: bool, undo: Callable[[], None]) -> None:
        """`undo` takes back what a step that could not be recorded has left on the host."""
        self.is_possible, self._undo = is_possible, undo
        self._key: Hashable = None
        self._recording: Recording | None = None
        self._seen, self._patience = 0, SETTLED
        self.refused: str | None = None
        """Why steps are not recorded, where it was tried."""

    def take(self, batch: Batch, key: Hashable, work: Work) -> Measured:
        """The work of a step, launched or replayed; `key` is all that its host decides."""
        if not self.is_possible or batch.side:
            return work(batch)
        key = key, *(None if x is None else (x.shape, x.dtype, x.stride()) for x in (batch.x, batch.target))
        if key != self._key:
            self._forget(key)
        self._seen += 1
        if self._recording is None and self._seen > self._patience:
            self._record(batch, work)
        return work(batch) if self._recording is None else self._recording.replay(batch)

    @property
    def is_recorded(self) -> bool:
        return self._recording is not None

    def forget(self) -> None:
        """What a recording was made of has been replaced."""
        self._forget(None)

    def _forget(self, key: Hashable) -> None:
        if self._recording is not None:
            served = self._seen - self._patience
            self._patience = self._patience * 2 if served < SERVED_WELL else SETTLED
        self._key, self._seen, self._recording = key, 0, None

    def _record(self, batch: Batch, work: Work) -> None:
        try:
            self._recording = record(batch, work)
        except (NotRecordable, RuntimeError) as error:  # CUDA refuses by the latter, and so does a full device
            self.is_possible, self.refused = False, str(error).partition("\n")[0]
            self._undo()


@dataclass(frozen=True, eq=False)
class Recording:
    """What a replay reads, and where it leaves what it tells."""

    launch: Callable[[], None]
    inputs: tuple[Tensor, ...]
    names: tuple[str, ...]
    told: Tensor  # float64 [names]

    def replay(self, batch: Batch) -> Measured:
        for there, value in zip(self.inputs, _tensors(batch), strict=True):
            there.copy_(value)
        self.launch()
        return dict(zip(self.names, self.told.clone(), strict=True))  # the next replay overwrites it


def record(batch: Batch, work: Work) -> Recording:
    """Nothing is done yet: launches are only noted."""
    inputs = tuple(value.clone() for value in _tensors(batch))
    own = Batch(inputs[0], None if batch.target is None else inputs[1])
    names: list[str] = []

    def tell() -> Tensor:
        measured = work(own)
        names.extend(measured)
        return torch.stack([value.detach().double() for value in measured.values()])

    launch, told = recorded(tell, batch.x.device)
    return Recording(launch, inputs, tuple(names), told)


def recorded(work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """What does the work again, and where its result will lie."""
    if device not in _memories:
        torch.cuda.empty_cache()  # what steps leave for the next one is not for recordings
        _memories[device] = Memory(device)
    graph, told = _memories[device].record(work)
    return graph.replay, told


class Memory:
    """What all recordings on a device use, and their stream: they are made and replayed one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        # The pool is given up with the last recording in it, and takes none after that: this one stays.
        self._first, _ = self.record(lambda: torch.zeros(1, device=device))

    def record(self, work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            # Other threads copy and allocate meanwhile, as a feed does; only what this one does is recorded.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                told = work()
            finally:
                graph.capture_end()
        here.wait_stream(self._stream)
        return graph, told


_memories: dict[torch.device, Memory] = {}


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return (batch.x,) if batch.target is None else (batch.x, batch.target)
