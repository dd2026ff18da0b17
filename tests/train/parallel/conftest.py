"""Several ranks in threads of one process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch


class Threads:
    """One of several ranks; a call returns when all have made it."""

    def __init__(self, board, barrier, rank):
        self._board, self._barrier, self.rank, self.size = board, barrier, rank, len(board)

    def sum(self, tensor):
        return torch.stack(self.gather(tensor)).sum(0)

    def begin_sum(self, tensor):
        tensor.copy_(self.sum(tensor))
        return lambda: None

    def gather(self, tensor):
        self._board[self.rank] = tensor.detach().clone()
        self._barrier.wait(timeout=60)
        everyone = list(self._board)
        self._barrier.wait(timeout=60)
        return everyone


@pytest.fixture
def threads():
    """`threads(n)`: n ranks, and a function that gives what `work(rank)` returns in each."""

    def make(size):
        board, barrier = [None] * size, threading.Barrier(size)
        ranks = [Threads(board, barrier, rank) for rank in range(size)]

        def run(work):
            def guarded(rank):
                try:
                    return work(rank)
                except BaseException:
                    barrier.abort()
                    raise

            with ThreadPoolExecutor(size) as pool:
                futures = [pool.submit(guarded, rank) for rank in range(size)]
                failed = [error for error in (future.exception() for future in futures) if error is not None]
                raise_first = [error for error in failed if not isinstance(error, threading.BrokenBarrierError)]
                for error in (*raise_first, *failed):
                    raise error
                return [future.result() for future in futures]

        return ranks, run

    return make
