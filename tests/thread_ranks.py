"""Several processes of a run as threads of this one: a replacement for gloo with the same calls.

Only one thread runs at a time, from one collective call to the next, so that events always come in the same order. A
rank that fails stops the others, as a lost process does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from saemill.train.errors import StoppedElsewhere

T = TypeVar("T")


class Turns:
    """Whose turn it is."""

    def __init__(self, size: int) -> None:
        self._moved = threading.Condition()
        self.restart(size)

    def restart(self, size: int) -> None:
        self._ranks, self._at, self._is_broken = list(range(size)), 0, False

    def begin(self, rank: int) -> None:
        with self._moved:
            self._wait(rank)

    def pass_on(self, rank: int) -> None:
        """Let the other ranks run until they make their call too."""
        with self._moved:
            self._at = (self._ranks.index(rank) + 1) % len(self._ranks)
            self._moved.notify_all()
            self._wait(rank)

    def end(self, rank: int, is_lost: bool) -> None:
        with self._moved:
            self._is_broken |= is_lost
            self._at = self._ranks.index(rank)
            self._ranks.remove(rank)
            self._at %= max(1, len(self._ranks))
            self._moved.notify_all()

    def _wait(self, rank: int) -> None:
        self._moved.wait_for(lambda: self._is_broken or self._ranks[self._at] == rank)
        if self._is_broken:
            raise StoppedElsewhere("another process of the run is gone")


class ThreadRanks:
    """One rank's `Group`; every rank makes the same calls in the same order."""

    def __init__(self, rank: int, size: int, turns: Turns, boards: dict[Any, dict[int, Any]], name: str = "") -> None:
        self.rank, self.size = rank, size
        self._turns, self._boards, self._name = turns, boards, name
        self._calls = self._others = 0

    def _gather(self, value: Any, *call: Any) -> list[Any]:
        """What each rank gives to the same `call`: NCCL would mix up different ones without a word."""
        self._calls += 1
        board = self._boards.setdefault((self._name, self._calls), {})
        board[self.rank] = value, call
        self._turns.pass_on(self.rank)
        if len(board) < self.size:
            raise StoppedElsewhere("another process of the run exited before this one")
        calls = [board[rank][1] for rank in range(self.size)]
        assert calls.count(call) == self.size, f"ranks make different calls: {calls}"
        return [board[rank][0] for rank in range(self.size)]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return self._gather(tensor.detach().clone(), "gather", tensor.dtype, tensor.shape[1:])

    def gather_on_first(self, part: Tensor, lengths: Sequence[int]) -> Tensor | None:
        parts = self.gather(part)
        assert [len(part) for part in parts] == list(lengths)
        return None if self.rank else torch.cat(parts)

    def sum(self, tensor: Tensor) -> Tensor:
        parts = self._gather(tensor.detach().clone(), "sum", tensor.dtype, tensor.shape)
        return torch.stack(parts).sum(0, dtype=tensor.dtype)

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        tensor.copy_(self.sum(tensor))
        return lambda: None

    def any(self, flag: bool) -> bool:
        return any(self._gather(flag, "any"))

    def texts(self, value: str) -> list[str]:
        return self._gather(value, "texts")

    def for_another_thread(self) -> ThreadRanks:
        self._others += 1
        return ThreadRanks(self.rank, self.size, self._turns, self._boards, f"{self._name}/{self._others}")

    def close(self) -> None:
        pass


def make(size: int) -> tuple[list[ThreadRanks], Callable[[Callable[[int], T]], list[T]]]:
    """Ranks, and a function that runs `work(rank)` in each and returns the results, or raises the original error."""
    turns, boards = Turns(size), {}
    ranks = [ThreadRanks(rank, size, turns, boards) for rank in range(size)]

    def run(work: Callable[[int], T]) -> list[T]:
        turns.restart(size)

        def in_turn(rank: int) -> T:
            is_lost = True
            try:
                turns.begin(rank)
                result = work(rank)
                is_lost = False
                return result
            finally:
                turns.end(rank, is_lost)

        with ThreadPoolExecutor(size) as pool:
            futures = [pool.submit(in_turn, rank) for rank in range(size)]
            failed = [error for error in (future.exception() for future in futures) if error is not None]
        for error in sorted(failed, key=lambda error: isinstance(error, StoppedElsewhere)):
            raise error
        return [future.result() for future in futures]

    return ranks, run
