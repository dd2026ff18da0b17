"""A step's launches, recorded once on a GPU and replayed as one.

At 16,384 latents the host takes as long to launch a step's kernels, some two hundred, as a GPU takes for them; a CUDA
graph is one launch. It does again exactly what was recorded, on the same memory, so a step is recorded only where the
host decides nothing but what its key holds: shapes, weights of terms, knobs, where weights and dead latents are
listed. A term is a function of its view, so what else could differ is what the host draws or counts, and that is
refused: such steps are launched one by one, and so are all of an SAE that has extras or reads side inputs, or that
shares its rows or latents with other processes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ...cache_schema.numbers_in_words import first_line
from ..data.batch import Batch
from ..data.device_copies import NotRecordable

Measured = dict[str, Tensor]  # what a step tells: scalars by name
Work = Callable[[Batch], Measured]

SETTLED = 2  # steps with one key before it is recorded, twice as many after each recording that hardly served
SERVED_WELL = 8  # steps
KEPT = 4  # keys: where massive rows are left out, batches have one row more or less


@dataclass(eq=False)
class Kind:
    """Steps with one key."""

    seen: int = 0
    served: int = 0
    is_recordable: bool = True
    recording: Recording | None = None


class Replays:
    """The recordings of one SAE's step, for as long as they hold."""

    def __init__(self, name: str, is_possible: bool, undo: Callable[[], None]) -> None:
        """`undo` takes back what a step that could not be recorded has left on the host."""
        self._name, self._undo = name, undo
        self.is_possible = is_possible
        self._kinds: dict[Hashable, Kind] = {}  # the one that was used last stands last
        self._patience = SETTLED
        self._memory: Memory | None = None

    def take(self, batch: Batch, key: Hashable, work: Work) -> Measured:
        """The work of a step, launched or replayed; `key` is all that its host decides."""
        if not self.is_possible or batch.side:
            return work(batch)
        kind = self._kind((key, *(None if x is None else (x.shape, x.dtype, x.stride()) for x in _given(batch))))
        kind.seen += 1
        if kind.recording is None and kind.is_recordable and kind.seen > self._patience:
            kind.recording = self._record(kind, batch, work)
        if kind.recording is None:
            return work(batch)
        kind.served += 1
        return kind.recording.replay(batch)

    @property
    def served(self) -> int:
        """How many steps those recordings have replayed that are kept."""
        return sum(kind.served for kind in self._kinds.values())

    def forget(self) -> None:
        """What recordings were made of has been replaced."""
        self._kinds.clear()

    def end(self) -> None:
        """No more are made, and what they took of the device, as much as a step, is given back."""
        self.is_possible, self._memory = False, None
        self.forget()

    def _kind(self, key: Hashable) -> Kind:
        kind = self._kinds.pop(key, None) or Kind()
        self._kinds[key] = kind
        if len(self._kinds) > KEPT:
            oldest = self._kinds.pop(next(iter(self._kinds)))
            if oldest.recording is not None:
                self._patience = self._patience * 2 if oldest.served < SERVED_WELL else SETTLED
        return kind

    def _record(self, kind: Kind, batch: Batch, work: Work) -> Recording | None:
        failed = None
        try:
            self._memory = memory_of(batch.x.device)
            self._memory.require_room()
            return record(batch, work, self._memory)
        except NotRecordable:  # as it should be: what it draws or counts must be drawn and counted in each step
            kind.is_recordable = False
            self._patience *= 2
        except RuntimeError as error:  # CUDA refuses by one, and so does a full device
            failed = first_line(error)
        self._undo()
        if failed is not None:  # outside: the error holds what was recorded so far
            self.end()
            warnings.warn(f"{self._name}: its steps are launched one by one, which is slower: {failed}", stacklevel=2)
        return None


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


def record(batch: Batch, work: Work, memory: Memory) -> Recording:
    """Nothing is done yet: launches are only noted."""
    inputs = tuple(value.clone() for value in _tensors(batch))
    own = Batch(inputs[0], None if batch.target is None else inputs[1])
    names: list[str] = []

    def tell() -> Tensor:
        measured = work(own)
        names.extend(measured)
        return torch.stack([value.detach().double() for value in measured.values()])

    launch, told = memory.record(tell)
    return Recording(launch, inputs, tuple(names), told)


class Memory:
    """What all recordings on a device use, and their stream: they are made and replayed one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Of the streams that torch deals out, none else here asks for one of these.
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device, priority=-1)
        # The pool is given up with the last recording in it, and takes none after that: this one stays.
        self._first, _ = self.record(lambda: torch.zeros(1, device=device))

    def require_room(self) -> None:
        """A recording has room of its own, beside that of steps that are launched before it and between."""
        largest = torch.cuda.max_memory_allocated(self._device) - torch.cuda.memory_allocated(self._device)
        if torch.cuda.mem_get_info(self._device)[0] < 2 * largest:
            torch.cuda.empty_cache()  # a recording takes nothing of what launched steps have left
        free = torch.cuda.mem_get_info(self._device)[0]
        if free < 2 * largest:
            raise RuntimeError(
                f"a step takes up to {largest / 2**30:.1f} GiB, and of {free / 2**30:.1f} GiB that are free a "
                "recording would leave too little"
            )

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What does the work again, and where its result will lie."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            # Other threads copy and allocate meanwhile, as a feed does; only what this one does is recorded.
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                told = work()
            except BaseException:
                self._end(graph)
                raise
            graph.capture_end()
        here.wait_stream(self._stream)
        return graph.replay, told

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """Of what cannot be recorded: neither the allocator nor the random numbers may go on as if it were."""
        try:
            graph.capture_end()
        except RuntimeError:  # CUDA has broken it off, and torch leaves both as they were in the middle of it
            if _memories.get(self._device) is self:  # whose page-locked part torch before 2.12 does not even let go of
                del _memories[self._device]
            here = self._stream.device_index
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(here, self._pool)
            # Whoever draws from the device's own generator, a notebook say: a copy of its state is in no recording.
            generator = torch.cuda.default_generators[here]
            generator.graphsafe_set_state(generator.clone_state())


_memories: WeakValueDictionary[torch.device, Memory] = WeakValueDictionary()


def memory_of(device: torch.device) -> Memory:
    """Shared by all SAEs that have recordings, and given back with the last of them."""
    memory = _memories.get(device)
    if memory is None:
        memory = _memories[device] = Memory(device)
    return memory


def _given(batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    return batch.x, batch.target


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return tuple(value for value in _given(batch) if value is not None)
