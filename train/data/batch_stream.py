"""The stream that a run trains on: step in, draw out.

`Feed` combines the plan (which tokens), the loader (their bytes) and the draw (their form). It serves any
number of SAEs from one read; `rank` of `size` processes takes its share of every batch. Nothing is read for
step `steps` or later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from ...cache_schema import Manifest, Request, Store
from ...cache_schema.sites import Place, say_place, site_of
from ..errors import NothingToTrain
from .batch import Kind, Needs, Rows
from .block import Block
from .drawn_rows import Draw, TokenOrder, WindowOrder
from .prefetch import PIECES_IN_FLIGHT, Loader, Pool
from .scaling import Stats, bounds_of
from .shuffle_order import BlockPlan, Plan, share, token_order, token_slice, window_order, window_slice


class Feed:
    """Draws of a run, for all SAEs in it."""

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
        """The rows that step `step` trains on. Valid until the next draw."""
        plan, at = self.plan.locate(step)
        block = self.loader.block(plan)
        rows = {kind: self._rows(kind, block, plan, at) for kind in self._kinds}
        return Draw(block, rows, self._scales, self.device)

    @property
    def is_windowed(self) -> bool:
        """Whether all SAEs draw whole windows; shuffling is measured on tokens if any SAE draws those."""
        return all(needs.windows for needs in self._needs)

    @cached_property
    def batch_tokens(self) -> float:
        """Mean number of text tokens per batch; where all SAEs draw whole windows, some windows are left out."""
        return self.plan.batch_tokens * (self.plan.windows_taken() if self.is_windowed else 1.0)

    @property
    def ideal_share(self) -> float:
        """The share of same-document pairs in a perfectly shuffled batch."""
        sizes = self.plan.sizes
        return sizes.same_first_document if self.is_windowed else sizes.same_document

    def close(self) -> None:
        self.loader.close()
        self._orders.clear()

    def _rows(self, kind: Kind, block: Block, plan: BlockPlan, at: int) -> Rows:
        """This process's share of the batch, as rows."""
        if kind not in self._orders or self._orders[kind][0] != plan:
            self._orders[kind] = plan, self._order(kind, block, plan)
        where = window_slice(plan, at) if kind.windows else token_slice(plan, at, self.plan.batch_tokens)
        return self._orders[kind][1].rows(share(where, self._rank, self._size))

    def _order(self, kind: Kind, block: Block, plan: BlockPlan) -> TokenOrder | WindowOrder:
        if not block.trains_on(kind.layers).any():
            shards = sorted({piece.shard for piece in plan.pieces})
            where = ", ".join(map(say_place, kind.layers))
            raise NothingToTrain(
                f"every token of shards {shards} is massive ({where}): there is nothing to train on. "
                "Set data.massive_norms=inf to train on all rows"
            )
        if kind.windows:
            return WindowOrder(block, window_order(plan, self.plan.seed), self.device, kind.layers)
        return TokenOrder(block, token_order(plan, self.plan.seed), self.device, kind.layers)


def joint_request(needs: Iterable[Needs], split: str) -> Request:
    """One request for everything that these SAEs read."""
    needs = tuple(needs)
    return Request.of(
        (site_of(place) for need in needs for place in need.layers),
        attention_layers=tuple(sorted({layer for need in needs for layer in need.attention_layers})),
        tokens=True,
        documents=True,
        split=split,
    )


def held_out_windows(manifest: Manifest, tokens: int) -> int:
    """How many windows of the validation split are measured for about this many tokens."""
    first, last = manifest.splits["validation"]
    return min(max(1, tokens // manifest.context), last - first)


def held_out(
    store: Store,
    needs: Iterable[Needs],
    stats: Mapping[Place, Stats],
    device: torch.device,
    *,
    tokens: int,
    batch_tokens: int,
) -> Iterator[Draw]:
    """About `tokens` tokens from the beginning of the validation split, in the order of the store.

    Includes massive rows; `Draw.ordinary` marks the others.
    """
    request, manifest = joint_request(needs, "validation"), store.manifest
    scales = {layer: stats[layer].scale.to(device) for layer in stats}
    per_batch = max(1, batch_tokens // manifest.context)
    spans = store.spans(replace(request, windows=(0, held_out_windows(manifest, tokens))))
    pool = Pool(store, request, max((span.windows for span in spans), default=0), device, bounds_of(stats))
    with ThreadPoolExecutor(PIECES_IN_FLIGHT, thread_name_prefix="saemill-held-out") as readers:
        for span in spans:  # one shard's windows at a time
            block = pool.fill([span], readers)
            order = WindowOrder(block, np.arange(len(block.windows)), device)
            for start in range(0, len(block.windows), per_batch):
                rows = order.rows(slice(start, min(start + per_batch, len(block.windows))))
                if len(rows.places):
                    yield Draw(block, {Kind(False, ()): rows, Kind(True, ()): rows}, scales, device)
            pool.release()
