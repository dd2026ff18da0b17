"""The stream that a run trains on: step in, draw out.

`Feed` joins the plan (which tokens), the loader (their bytes) and the draw (their form). It serves any
number of SAEs from one read; `rank` of `size` processes takes its share of every batch. Nothing is read for
steps from `steps` on.

`Loader` has the blocks in the order of the plan, the next one read while the present one trains. Two pools of memory
take turns; where the whole split fits into one, it is read once. The time that training had to wait is counted, the
first block apart: nothing could have been read before it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

import numpy as np
import torch

from ...cache_schema import Request, Store
from ...cache_schema.sites import Place, say_place, site_of
from ..errors import NothingToTrain
from .batch import Kind, Needs, Rows
from .block import Block
from .drawn_rows import Draw, TokenOrder, WindowOrder
from .pool import PIECES_IN_FLIGHT, Pool
from .scaling import Stats, bounds_of
from .shuffle import BlockPlan, Plan, share, token_order, token_slice, window_order, window_slice


class Feed:
    """Draws of a run, for all who train in it."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        needs: Iterable[Needs],
        stats: Mapping[Place, Stats],
        device: torch.device,
        rank: int = 0,
        size: int = 1,
        steps: int | None = None,
        split: str = "train",
    ) -> None:
        self._needs = tuple(needs)
        self.plan = plan
        bounds = bounds_of(stats)
        self._kinds = tuple(dict.fromkeys(need.kind(bounds) for need in self._needs))
        self.loader = Loader(store, plan, joint_request(self._needs, split), device, steps, bounds)
        self._scales = {layer: stats[layer].scale.to(device) for layer in stats}
        self.device = device
        self._rank, self._size = rank, size
        self._orders: dict[Kind, tuple[BlockPlan, TokenOrder | WindowOrder]] = {}

    def draw(self, step: int) -> Draw:
        """What step `step` trains on. Valid until the next draw."""
        plan, at = self.plan.locate(step)
        block = self.loader.block(plan)
        rows = {kind: self._rows(kind, block, plan, at) for kind in self._kinds}
        return Draw(block, rows, self._scales, self.device)

    @property
    def is_windowed(self) -> bool:
        """Whether everyone draws whole windows; shuffling is measured on tokens where anyone draws those."""
        return all(needs.windows for needs in self._needs)

    @property
    def ideal_share(self) -> float:
        """The share of same-document pairs in a perfectly shuffled batch."""
        sizes = self.plan.sizes
        return sizes.same_first_document if self.is_windowed else sizes.same_document

    def close(self) -> None:
        self.loader.close()

    def _rows(self, kind: Kind, block: Block, plan: BlockPlan, at: int) -> Rows:
        """This process's share of the batch."""
        if kind not in self._orders or self._orders[kind][0] != plan:
            self._orders[kind] = plan, self._order(kind, block, plan)
        where = window_slice(plan, at) if kind.windows else token_slice(plan, at, self.plan.batch_tokens)
        return self._orders[kind][1].rows(share(where, self._rank, self._size))

    def _order(self, kind: Kind, block: Block, plan: BlockPlan) -> TokenOrder | WindowOrder:
        if not block.counts(kind.layers).any():
            shards = sorted({piece.shard for piece in plan.pieces})
            where = ", ".join(map(say_place, kind.layers))
            raise NothingToTrain(
                f"every token of shards {shards} is massive ({where}): nothing there to train on. "
                "Set data.massive_norms=inf to train on all rows"
            )
        if kind.windows:
            return WindowOrder(block, window_order(plan, self.plan.seed), self.device, kind.layers)
        return TokenOrder(block, token_order(plan, self.plan.seed), self.device, kind.layers)


def joint_request(needs: Iterable[Needs], split: str) -> Request:
    """What all of them read together."""
    needs = tuple(needs)
    return Request.of(
        (site_of(place) for need in needs for place in need.layers),
        attention_layers=tuple(sorted({layer for need in needs for layer in need.attention_layers})),
        tokens=True,
        documents=True,
        split=split,
    )


def held_out(
    store: Store,
    needs: Iterable[Needs],
    stats: Mapping[Place, Stats],
    device: torch.device,
    *,
    tokens: int,
    batch_tokens: int,
) -> Iterator[Draw]:
    """The beginning of the validation split, in the order of the store, about `tokens` tokens of it.

    All rows, massive ones too: `Draw.ordinary` says which are not.
    """
    request = joint_request(needs, "validation")
    scales = {layer: stats[layer].scale.to(device) for layer in stats}
    per_batch = max(1, batch_tokens // store.manifest.context)
    windows = max(1, tokens // store.manifest.context)
    for block in _blocks_in_order(store, request, device, windows, bounds_of(stats)):
        order = WindowOrder(block, np.arange(len(block.windows)), device)
        for start in range(0, len(block.windows), per_batch):
            rows = order.rows(slice(start, min(start + per_batch, len(block.windows))))
            if len(rows.places):
                yield Draw(block, {Kind(False, ()): rows, Kind(True, ()): rows}, scales, device)


def _blocks_in_order(
    store: Store, request: Request, device: torch.device, windows: int, bounds: Mapping[Place, float]
) -> Iterator[Block]:
    """One shard's windows at a time, until there are enough."""
    first, last = store.manifest.splits["validation"]
    spans = store.spans(replace(request, windows=(0, min(windows, last - first))))
    pool = Pool(store, request, max((span.windows for span in spans), default=0), device, bounds)
    with ThreadPoolExecutor(PIECES_IN_FLIGHT, thread_name_prefix="saemill-held-out") as readers:
        for span in spans:
            yield pool.fill([span], readers)
            pool.release()


class Loader:
    """Gives blocks, one after the other; `close` it in the end."""

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
        """The block of this plan. The one before must not be drawn from any more."""
        if self._present is None or self._present[0].pieces != plan.pieces:
            self._advance(plan)
        assert self._present is not None
        return self._present[1]

    def close(self) -> None:
        """Stop reading."""
        for executor in (self._filler, self._readers):
            executor.shutdown(wait=True, cancel_futures=True)

    def _advance(self, plan: BlockPlan) -> None:
        """Make a block the present one, and begin to read the one after it."""
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
        """Unless the run, whose length may be unknown, ends before."""
        is_last = self._steps is not None and plan.first_step + plan.steps >= self._steps
        if len(self._pools) > 1 and not is_last:
            after = self._plan.after(plan)
            self._next = after, self._filler.submit(self._pools[1].fill, after.pieces, self._readers)

    def _abandon_next(self) -> None:
        """A step out of order was asked for: what was read ahead is of no use."""
        if self._next is not None:
            if not self._next[1].cancel():
                wait([self._next[1]])
            self._next = None
