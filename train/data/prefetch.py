"""Blocks in the order of the plan, with the next one read while the current one trains.

Two pools of memory take turns; if the whole split fits into one, it is read once. A pool is filled from the store piece
by piece, several pieces at a time. On the CPU a piece is read directly into its place. For a GPU it is read into
page-locked memory and copied from there on a separate stream, while the next piece is read. A pool is refilled once
the GPU has finished all work launched while its block was drawn from; the reading threads wait for that, but no step
does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from ...cache_schema import AttentionCsr, Manifest, Request, Span, Store, shard_memory
from ...cache_schema.massive_activations import is_massive, row_norms
from ...cache_schema.sites import Place, place_of, site_of
from ...cache_schema.token_counts_and_summary import trainable
from .block import TORCH_DTYPES, Attention, Block, StoredRows, as_stored, copied, send_attention
from .device_copies import take_device
from .shuffle_order import BlockPlan, Plan

PIECES_IN_FLIGHT = 4


class Pool:
    """Memory for one block."""

    def __init__(
        self,
        store: Store,
        request: Request,
        max_windows: int,
        device: torch.device,
        bounds: Mapping[Place, float],
    ) -> None:
        """`bounds`: by layer, the largest norm of a row that is not massive."""
        manifest = store.manifest
        self._bounds = {place: bound for place, bound in bounds.items() if site_of(place) in request.sites}
        self._store, self._request, self._device = store, request, device
        is_gpu = device.type == "cuda"
        ids = torch.empty((2, max_windows, manifest.context), dtype=torch.int32, pin_memory=is_gpu)
        self._ids, self._ids_on_device = ids, torch.empty_like(ids, device=device) if is_gpu else ids
        self._tokens, self._documents = ids.numpy().view("<u4")
        shape, dtype = (max_windows, manifest.context), TORCH_DTYPES[manifest.stored_dtype]
        self._resid = {
            place_of(*site): StoredRows(
                torch.empty((*shape, manifest.width_of(site.hook)), dtype=dtype, device=device),
                torch.empty(shape, dtype=torch.float32, device=device) if manifest.stored_as else None,
            )
            for site in request.sites
        }
        self._massive = {layer: np.zeros((max_windows, manifest.context), bool) for layer in self._bounds}
        self._stages: SimpleQueue[Stage] = SimpleQueue()
        for _ in range(PIECES_IN_FLIGHT):
            self._stages.put(Stage(manifest, request, device))
        self._stream = torch.cuda.Stream(device) if is_gpu else None
        self._drawn = torch.cuda.Event() if is_gpu else None
        self.release()  # the GPU may still be reading what this memory held before

    def fill(self, pieces: Sequence[Span], readers: Executor) -> Block:
        """Read a block; returns when it is complete."""
        take_device(self._device)
        if self._drawn is not None:
            self._drawn.synchronize()
        starts = np.cumsum([0] + [piece.windows for piece in pieces]).tolist()
        attention = list(readers.map(self._load, pieces, starts[:-1]))
        self._store.require_not_replaced()
        windows = starts[-1]
        tokens_on_device, documents_on_device = self._ids_on_device[:, :windows]
        return Block(
            pieces=tuple(pieces),
            documents=self._documents[:windows],
            trains=trainable(self._store.manifest, self._tokens[:windows]),
            tokens_on_device=tokens_on_device,
            documents_on_device=documents_on_device,
            resid={layer: resid.flat() for layer, resid in self._resid.items()},
            attention=self._send_attention(attention),
            massive={layer: massive[:windows] for layer, massive in self._massive.items()},
        )

    def release(self) -> None:
        """Mark that no more draws will follow; the GPU may still be working on earlier ones."""
        if self._drawn is not None:
            self._drawn.record(torch.cuda.current_stream(self._device))

    def _send_attention(self, parts: list[dict[int, AttentionCsr]]) -> dict[int, Attention]:
        """Send the pieces' attention on this pool's own stream: only its next fill reuses that stream's memory."""
        layers = parts[0] if parts else ()
        with on_stream(self._stream):
            joined = {layer: AttentionCsr.concat([part[layer] for part in parts]) for layer in layers}
            there = {layer: send_attention(csr, self._device) for layer, csr in joined.items()}
        if self._stream is not None:
            self._stream.synchronize()
        return there

    def _load(self, piece: Span, start: int) -> dict[int, AttentionCsr]:
        """Read one piece into its place."""
        take_device(self._device)
        stage = self._stages.get()
        try:
            rows = slice(start, start + piece.windows)
            resid = {layer: one.windows(rows) for layer, one in self._resid.items()}
            places = {path: place for layer, one in resid.items() for path, place in one.by_path(layer).items()}
            host = {"tokens": self._tokens[rows], "documents": self._documents[rows]}
            found = self._store.read(self._request, piece, stage.targets(host, places))
            stage.copy(places, (self._ids_on_device[:, rows], self._ids[:, rows]))
            for layer, bound in self._bounds.items():
                self._massive[layer][rows] = is_massive(stage.norms(resid[layer]), bound)
            return {layer: copied(csr) for layer, csr in found.attention.items()}
        finally:
            self._stages.put(stage)


class Stage:
    """Temporary memory for a piece: for attention, and for residuals on their way to a GPU."""

    def __init__(self, manifest: Manifest, request: Request, device: torch.device) -> None:
        self._attention = shard_memory(manifest, Request(attention_layers=request.attention_layers))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned: dict[str, Tensor] = {}
        self._dtype = manifest.stored_dtype

    def targets(self, host: dict[str, np.ndarray], places: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """The arrays into which the store reads a piece, by path."""
        targets = places if self._stream is None else self._pinned_like(places)
        return {**host, **{path: as_stored(target) for path, target in targets.items()}, **self._attention}

    def copy(self, places: dict[str, Tensor], ids: tuple[Tensor, Tensor]) -> None:
        """Copy residuals, tokens and documents to the device, unless they were read there directly."""
        if self._stream is None:
            return
        with on_stream(self._stream):
            for path, place in places.items():
                place.copy_(self._pinned[path][: len(place)], non_blocking=True)
            for there, here in zip(*ids, strict=True):
                there.copy_(here, non_blocking=True)
        self._stream.synchronize()

    def norms(self, resid: StoredRows) -> np.ndarray:
        """float32 [W, T]: norms of residuals, computed where they are now."""
        if self._stream is None:
            scales = None if resid.scales is None else resid.scales.numpy()
            return row_norms(as_stored(resid.stored), self._dtype, scales)
        with on_stream(self._stream):
            return resid.norms().cpu().numpy()

    def _pinned_like(self, places: dict[str, Tensor]) -> dict[str, Tensor]:
        """Page-locked memory of a piece's size; pieces larger than the first occur only at the start of a shard."""
        for path, place in places.items():
            if path not in self._pinned or len(self._pinned[path]) < len(place):
                self._pinned[path] = torch.empty(place.shape, dtype=place.dtype, pin_memory=True)
        return {path: self._pinned[path][: len(place)] for path, place in places.items()}


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """A context in which a GPU's work goes to this stream, if there is one."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


class Loader:
    """Provides blocks one after the other; call `close` at the end.

    Counts the time that training waits, separately for the first block, which cannot be read ahead.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        request: Request,
        device: torch.device,
        steps: int | None,
        bounds: Mapping[Place, float],
    ) -> None:
        self._plan, self._steps = plan, steps
        self._readers = ThreadPoolExecutor(PIECES_IN_FLIGHT, thread_name_prefix="saemill-piece")
        self._filler = ThreadPoolExecutor(1, thread_name_prefix="saemill-block")
        count = 1 if plan.is_one_block else 2
        self._pools = [Pool(store, request, plan.max_windows, device, bounds) for _ in range(count)]
        self._current: tuple[BlockPlan, Block] | None = None
        self._next: tuple[BlockPlan, Future[Block]] | None = None
        self.first_wait_seconds = 0.0
        self.waited_seconds = 0.0

    def block(self, plan: BlockPlan) -> Block:
        """The block of this plan. The previous one must no longer be drawn from."""
        if self._current is None or self._current[0].pieces != plan.pieces:
            self._advance(plan)
        assert self._current is not None
        return self._current[1]

    def close(self) -> None:
        """Stop reading and release the memory."""
        for executor in (self._filler, self._readers):
            executor.shutdown(wait=True, cancel_futures=True)
        self._pools, self._current, self._next = [], None, None

    def _advance(self, plan: BlockPlan) -> None:
        """Make a block the current one, and start reading the next."""
        started, is_first = time.perf_counter(), self._current is None
        if self._current is not None:
            self._pools[0].release()
            self._pools.reverse()
        if self._next is None or self._next[0] != plan:
            if self._next is not None and not self._next[1].cancel():  # a step was requested out of order
                wait([self._next[1]])
            self._next = plan, self._filler.submit(self._pools[0].fill, plan.pieces, self._readers)
        self._current = plan, self._next[1].result()
        self._next = None
        waited = time.perf_counter() - started
        self.first_wait_seconds += waited if is_first else 0.0
        self.waited_seconds += 0.0 if is_first else waited
        is_last = self._steps is not None and plan.first_step + plan.steps >= self._steps
        if len(self._pools) > 1 and not is_last:
            after = self._plan.after(plan)
            self._next = after, self._filler.submit(self._pools[1].fill, after.pieces, self._readers)
