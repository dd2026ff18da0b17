"""Work in pieces that get smaller if memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from ...cache_schema.numbers_in_words import first_line
from ...train.run.fits_in_memory import free_bytes
from ..errors import MemoryTooSmall

T = TypeVar("T")
NO_ROOM = "Free some memory, or evaluate narrower SAEs or on another --device"


class PieceSize:
    """How many items are processed at once: a multiple of `together`, halved when memory runs out, never raised."""

    def __init__(self, size: int, what: str, say: Callable[[str], None], together: int = 1) -> None:
        self.size = whole(size, together)
        self._what, self._say, self._together = what, say, together

    def halve(self, error: BaseException) -> None:
        if self.size == self._together:
            few = "one" if self._together == 1 else "two"
            raise MemoryTooSmall(
                f"not even {few} of the {self._what} at a time fits into memory ({first_line(error)}). {NO_ROOM}"
            ) from error
        self.size = whole(self.size // 2, self._together)
        self._say(f"out of memory: continuing with {self.size} {self._what} at a time")


def whole(size: int, together: int) -> int:
    """The largest multiple of `together` up to `size`, and at least `together`."""
    return max(together, size - size % together)


def in_pieces(total: int, size: PieceSize, work: Callable[[int, int], T]) -> Iterator[T]:
    """`work(start, stop)` over 0..total; a piece that does not fit is tried again as two."""
    start = 0
    while start < total:
        stop = min(start + size.size, total)
        try:
            result = work(start, stop)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            size.halve(error)
            torch.cuda.empty_cache()
            continue
        yield result
        start = stop


def room_for_weights(device: torch.device) -> int:
    """Bytes that SAEs may take at once: half of the host's free memory, or a quarter of a GPU's, as the model and
    batches need the rest."""
    if device.type != "cuda":
        return free_bytes(device) // 2
    torch.cuda.empty_cache()
    return free_bytes(device) // 4


def within(room: int, items: Sequence[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Consecutive groups of items, each as many as there is room for, and at least one."""
    group: list[T] = []
    for item in items:
        if group and sum(map(size_of, group)) + size_of(item) > room:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has its own error type; the CPU's allocator only a message."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return not isinstance(error, MemoryTooSmall)
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
