"""Blocks in the order of the plan, with the next one read while the current one trains.

Two pools of memory take turns; if the whole split fits into one, it is read once. The time that training waits is
counted, separately for the first block, which cannot be read ahead.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from ...cache_schema import Request, Store
from ...cache_schema.sites import Place
from .block import Block
from .fill_pool import PIECES_IN_FLIGHT, Pool
from .shuffle_order import BlockPlan, Plan


class Loader:
    """Provides blocks, one after the other; call `close` at the end."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        request: Request,
        device: torch.device,
        steps: int | None = None,
        bounds: Mapping[Place, float] | None = None,
    ) -> None:
        self._plan, self._steps = plan, steps
        self._readers = ThreadPoolExecutor(PIECES_IN_FLIGHT, thread_name_prefix="saemill-piece")
        self._filler = ThreadPoolExecutor(1, thread_name_prefix="saemill-block")
        count = 1 if plan.is_one_block else 2
        self._pools = [Pool(store, request, plan.max_windows, device, bounds) for _ in range(count)]
        self._present: tuple[BlockPlan, Block] | None = None
        self._next: tuple[BlockPlan, Future[Block]] | None = None
        self.first_wait_seconds = 0.0
        self.waited_seconds = 0.0

    def block(self, plan: BlockPlan) -> Block:
        """The block of this plan. The previous one must no longer be drawn from."""
        if self._present is None or self._present[0].pieces != plan.pieces:
            self._advance(plan)
        assert self._present is not None
        return self._present[1]

    def close(self) -> None:
        """Stop reading and release the memory."""
        for executor in (self._filler, self._readers):
            executor.shutdown(wait=True, cancel_futures=True)
        self._pools, self._present, self._next = [], None, None

    def _advance(self, plan: BlockPlan) -> None:
        """Make a block the current one, and start to read the next."""
        started, is_first = time.perf_counter(), self._present is None
        if self._present is not None:
            self._pools[0].release()
            self._pools.reverse()
        if self._next is None or self._next[0] != plan:
            self._abandon_next()
            self._next = plan, self._filler.submit(self._pools[0].fill, plan.pieces, self._readers)
        self._present = plan, self._next[1].result()
        self._next = None
        waited = time.perf_counter() - started
        self.first_wait_seconds += waited if is_first else 0.0
        self.waited_seconds += 0.0 if is_first else waited
        self._read_ahead(plan)

    def _read_ahead(self, plan: BlockPlan) -> None:
        """Start to read the next block, unless the run, whose length may be unknown, ends before."""
        is_last = self._steps is not None and plan.first_step + plan.steps >= self._steps
        if len(self._pools) > 1 and not is_last:
            after = self._plan.after(plan)
            self._next = after, self._filler.submit(self._pools[1].fill, after.pieces, self._readers)

    def _abandon_next(self) -> None:
        """Discard what was read ahead, after a step out of order was requested."""
        if self._next is not None:
            if not self._next[1].cancel():
                wait([self._next[1]])
            self._next = None
