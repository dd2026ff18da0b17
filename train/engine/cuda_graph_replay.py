"""A step's launches, recorded once on a GPU and replayed as one.

At 16,384 latents the host takes as long to launch a step's two hundred or so kernels as a GPU takes to run them; a
CUDA graph is one launch. It repeats exactly what was recorded, on the same memory, so a step can be recorded only if
the host decides nothing beyond its key: shapes, which terms count, knobs, the number of listed dead latents, and the
addresses of tables. A term is a function of its view, so only what the host draws or counts could differ between
replays. What is drawn by `view.draw` is drawn again for each replay. Steps that draw in another way, or count on the
host, are launched kernel by kernel, and so are all steps of an SAE that has extras which are not said to be recordable,
or that shares its rows or latents with other processes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ...cache_schema.numbers_in_words import first_line
from ..data.batch import Batch, rounded_up
from ..data.device_copies import NotRecordable, page_locked, send

Measured = dict[str, Tensor]  # what a step reports: scalars by name
Work = Callable[[Batch], Measured]
HostDraw = Callable[[], Tensor]

SETTLED = 2  # steps with a key before it is recorded; doubled after each recording that was hardly used
SERVED_WELL = 3  # replays that make a recording worthwhile
RENEWED = 256  # dropped recordings after which a device gets a new memory pool: they leave gaps of different sizes
KEPT = 32  # keys at a time: in batches of windows the number of rows varies by a few, as windows have special rows


@dataclass(eq=False)
class Kind:
    """The steps with one key."""

    seen: int = 0
    served: int = 0
    is_recordable: bool = True
    recording: Recording | None = None


class Replays:
    """The recordings of one SAE's step, while they are valid."""

    def __init__(self, name: str, is_possible: bool, generator: torch.Generator, undo: Callable[[], None]) -> None:
        """`undo` reverts the host's part of a step that was not executed, and what it drew from the generator."""
        self._name, self._generator, self._undo = name, generator, undo
        self.is_possible = is_possible
        self.served = 0
        """How many steps have been replayed."""
        self._kinds: dict[Hashable, Kind] = {}  # ordered by last use
        self._patience = SETTLED
        self._memory: Memory | None = None
        self._inputs: dict[int, Tensor] = {}  # memory for each input, shared by recordings for different sizes
        self._drawn: list[tuple[HostDraw, Tensor]] | None = None  # by the step that is being recorded

    def draw(self, on_host: HostDraw, device: torch.device) -> Tensor:
        """On the device, what the host draws in a step; a replay of the step draws it again."""
        drawn = on_host()
        if self._drawn is None:
            return send(drawn, device)
        there = torch.empty_like(drawn, device=device)
        self._drawn.append((on_host, there))
        return there

    def take(self, batch: Batch, key: Hashable, work: Work) -> Measured:
        """Launch or replay a step; `key` is everything that the host decides in it."""
        if not self.is_possible:
            return work(batch)
        if self._memory is not None and self._memory.is_used_up:
            self.forget()  # or the old pool's memory would stay
            self._memory = None
        inputs = batch.tensors()
        kind = self._kind((key, *batch.side, *((x.shape, x.dtype) for x in inputs)))
        kind.seen += 1
        if kind.recording is None and kind.is_recordable and kind.seen > self._patience:
            kind.recording = self._record(kind, batch, work)
        if kind.recording is None:
            return work(batch)
        kind.served += 1
        self.served += 1
        return kind.recording.replay(inputs)

    def forget(self) -> None:
        """Drop all recordings, since the tensors that they use have been replaced."""
        self._kinds.clear()

    def end(self) -> None:
        """Stop recording, and release the recordings' memory, which is as much as a step's."""
        self.is_possible, self._memory = False, None
        self._inputs.clear()
        self.forget()

    def _kind(self, key: Hashable) -> Kind:
        kind = self._kinds.pop(key, None) or Kind()
        self._kinds[key] = kind
        if len(self._kinds) > KEPT:
            oldest = self._kinds.pop(next(iter(self._kinds)))
            if oldest.recording is not None and self._memory is not None:
                self._memory.dropped += 1
                self._patience = self._patience * 2 if oldest.served < SERVED_WELL else SETTLED
        return kind

    def _record(self, kind: Kind, batch: Batch, work: Work) -> Recording | None:
        failed = None
        try:
            self._memory = memory_of(batch.x.device)
            self._memory.require_room()
            return self._record_with_draws(batch, work, self._memory)
        except NotRecordable:  # expected of steps in which the host decides something else
            kind.is_recordable = False
            self._patience *= 2
        except RuntimeError as error:  # CUDA refused, or the device is full
            failed = first_line(error)
        self._undo()
        if failed is not None:  # not in the handler, where the error still holds the partial recording
            self.end()
            warnings.warn(f"{self._name}: its steps are not recorded, which is slower: {failed}", stacklevel=2)
        return None

    def _record_with_draws(self, batch: Batch, work: Work, memory: Memory) -> Recording:
        own, before = self._copy(batch), self._generator.get_state()
        self._drawn = drawn = []
        try:
            recording = record(own, work, memory, drawn)
        finally:
            self._drawn = None
        after = self._generator.get_state()
        self._generator.set_state(before)
        for draw, _ in drawn:
            draw()
        if not torch.equal(self._generator.get_state(), after):
            raise NotRecordable("the host draws random numbers for something else than `view.draw`")
        self._generator.set_state(before)  # its first replay draws
        return recording

    def _copy(self, batch: Batch) -> Batch:
        """A copy in memory that recordings for other sizes share, since only one at a time is replayed."""
        number = count()

        def copy(value: Tensor) -> Tensor:
            index = next(number)
            memory = self._inputs.get(index)
            if memory is None or memory.dtype != value.dtype or memory.numel() < value.numel():
                size = rounded_up(value.numel())
                memory = self._inputs[index] = torch.empty(size, dtype=value.dtype, device=value.device)
            return memory[: value.numel()].view(value.shape).copy_(value)

        return batch.map(copy)


@dataclass(frozen=True, eq=False)
class Recording:
    """A recorded step, the memory that it reads, and the memory to which it writes its measurements."""

    launch: Callable[[], None]
    inputs: list[Tensor]
    drawn: list[tuple[HostDraw, Tensor]]
    names: tuple[str, ...]
    values: Tensor  # float64 [names]

    def replay(self, inputs: list[Tensor]) -> Measured:
        for there, value in zip(self.inputs, inputs, strict=True):
            there.copy_(value)
        for draw, there in self.drawn:
            drawn = draw()
            assert drawn.shape == there.shape, "what the host draws in a step has the same shape in each replay"
            there.copy_(page_locked(drawn, there.device), non_blocking=True)
        self.launch()
        return dict(zip(self.names, self.values.clone(), strict=True))  # the next replay overwrites them


def record(batch: Batch, work: Work, memory: Memory, drawn: list[tuple[HostDraw, Tensor]]) -> Recording:
    """Record a step on this batch's memory; `work` adds to `drawn`. Nothing is executed yet."""
    names: list[str] = []

    def measure() -> Tensor:
        measured = work(batch)
        names.extend(measured)
        return torch.stack([value.detach().double() for value in measured.values()])

    launch, values = memory.record(measure)
    return Recording(launch, batch.tensors(), drawn, tuple(names), values)


class Memory:
    """Memory pool and stream shared by all recordings on a device, which are made and replayed one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.dropped = 0
        # A priority that nothing else here uses, so that torch gives the stream to no one else.
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device, priority=-1)
        # A pool is released with its last recording and accepts no new one after that, so this one is kept.
        self._first, _ = self.record(lambda: torch.zeros(1, device=device))

    def require_room(self) -> None:
        """Require room for a recording next to launched steps."""
        largest = torch.cuda.max_memory_allocated(self._device) - torch.cuda.memory_allocated(self._device)
        if torch.cuda.mem_get_info(self._device)[0] < 2 * largest:
            torch.cuda.empty_cache()  # a recording cannot reuse memory cached by launched steps
        free = torch.cuda.mem_get_info(self._device)[0]
        if free < 2 * largest:
            raise RuntimeError(
                f"a step takes up to {largest / 2**30:.1f} GiB, and a recording would leave too little of the "
                f"{free / 2**30:.1f} GiB that are free"
            )

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A function that repeats the work, and the tensor for its result."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # Other threads, such as the feed's, keep copying and allocating; only this one is recorded.
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                result = work()
                graph.capture_end()
            except BaseException:
                self._end(graph)
                raise
        current.wait_stream(self._stream)
        return graph.replay, result

    @property
    def is_used_up(self) -> bool:
        return self.dropped > RENEWED

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a failed recording, so that the allocator and random numbers do not act as if it were still running."""
        try:
            graph.capture_end()
        except RuntimeError:  # CUDA has aborted it, and torch leaves both in recording mode
            if _memories.get(self._device) is self:  # torch before 2.12 does not even release its page-locked part
                del _memories[self._device]
            device_index = self._stream.device_index
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(device_index, self._pool)
            # For other users of the device's own generator, say a notebook: a copy of its state is in no recording.
            generator = torch.cuda.default_generators[device_index]
            generator.graphsafe_set_state(generator.clone_state())


_memories: WeakValueDictionary[torch.device, Memory] = WeakValueDictionary()


def memory_of(device: torch.device) -> Memory:
    """Shared by all SAEs that have recordings, and released with the last of them."""
    memory = _memories.get(device)
    if memory is None or memory.is_used_up:
        memory = _memories[device] = Memory(device)
    return memory
