"""From tokens to committed shards.

1. Claim a shard and read its tokens back from the store: any worker may do any shard, in any order.
2. Run its windows through the model in batches that depend only on the manifest.
3. On a CUDA device, a batch is measured and copied to the host by a second stream while the next one runs.
4. A background thread writes and commits the shard while the next one is computed: never more than two shards are in
   memory.
The device, and its settings that affect the last digits, are recorded with each shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..cache_schema import AttentionCsr, Manifest, Moments, ShardContent, Store, StoreWriter
from ..cache_schema.commits import CommitRecord, DeviceRecord
from ..cache_schema.moments import merge
from ..cache_schema.sites import Site
from ..cache_schema.stored_dtypes import STORED_AS
from .capture import Captured, capture
from .model.fused_on_gpu import is_served
from .model.load_and_truncate import TruncatedModel, name_full_device
from .model.products_in_16_bits import is_widened
from .sparsify_attention import to_csr
from .stats import is_special, measure

Report = Callable[[CommitRecord], None]
SMALLER_BATCH = (
    "Wait for other programs on it to finish, then run this again. Or start a new store, because these decide its "
    "values: with a smaller --batch-windows, or a smaller --context, with whose square memory for attention grows"
)


@dataclass(frozen=True)
class Harvester:
    """A model, and the store that it is harvested for."""

    model: TruncatedModel
    manifest: Manifest
    device: torch.device

    @property
    def batch_windows(self) -> int:
        return int(self.manifest.corpus.settings["batch_windows"])

    @property
    def computes_on(self) -> DeviceRecord:
        return describe_device(self.device, getattr(torch, self.manifest.model.dtype))


def harvest_shards(writer: StoreWriter, harvester: Harvester, shards: Iterable[int], report: Report) -> list[int]:
    """Compute, write and commit; return the shards that other writers hold or have committed."""
    elsewhere = []
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="saemill-commit") as background, Store(writer.files) as store:
        for shard in shards:
            with ExitStack() as stack:
                if not stack.enter_context(writer.claim(shard)):
                    elsewhere.append(shard)
                    continue
                with name_full_device(harvester.device, f"batches of {harvester.batch_windows} windows", SMALLER_BATCH):
                    first, _ = harvester.manifest.shard_range(shard)
                    content = compute_shard(harvester, *store.beginning(shard), first)
                if writing is not None:
                    writing.result()
                keep = partial(_write, writer, harvester, shard, claim=stack.pop_all(), report=report, lost=elsewhere)
                writing = background.submit(keep, content)
                del content  # frees it before the next shard is computed
    if writing is not None:
        writing.result()
    return elsewhere


def compute_shard(
    harvester: Harvester, tokens_WT: np.ndarray, documents_WT: np.ndarray, first: int = 0
) -> ShardContent:
    """All arrays of one shard, whose first window is the store's window `first`."""
    collector = _Collector(harvester, tokens_WT, first)
    for start in range(0, len(tokens_WT), harvester.batch_windows):
        collector.add(start, tokens_WT[start : start + harvester.batch_windows])
    collector.finish()
    moments, parts = {site: merge(found) for site, found in collector.moments.items()}, collector.attention
    attention = {layer: AttentionCsr.concat(parts.pop(layer)) for layer in tuple(parts)}  # frees joined parts
    return ShardContent(tokens_WT, documents_WT, collector.acts, moments, attention)


def _write(
    writer: StoreWriter,
    harvester: Harvester,
    shard: int,
    content: ShardContent,
    claim: ExitStack,
    report: Report,
    lost: list[int],
) -> None:
    with claim:
        record = writer.write(shard, content, harvester.computes_on)
    if record is None:
        lost.append(shard)
    else:
        report(record)


@dataclass(frozen=True)
class _Launched:
    """A batch that the device may still be working on."""

    start: int
    ids: Tensor
    captured: Captured
    done: torch.Event | None


class _Collector:
    """Gathers batches into the arrays of a shard, one batch behind a device that runs asynchronously."""

    def __init__(self, harvester: Harvester, tokens_WT: np.ndarray, first: int) -> None:
        manifest = harvester.manifest
        dtype = STORED_AS[manifest.model.dtype]
        self.harvester, self.first = harvester, first
        is_gpu = harvester.device.type == "cuda"
        self.acts = {
            site: _make_room((*tokens_WT.shape, manifest.width_of(site.hook)), dtype, is_gpu) for site in manifest.sites
        }
        self.moments: dict[Site, list[Moments]] = {site: [] for site in manifest.sites}
        self.attention: dict[int, list[AttentionCsr]] = {layer: [] for layer in manifest.attention.layers}
        self._behind: _Launched | None = None
        self._stream = torch.cuda.Stream(harvester.device) if is_gpu else None

    def add(self, start: int, tokens_WT: np.ndarray) -> None:
        """Start a batch, then collect the previous one."""
        ids = torch.from_numpy(tokens_WT.astype(np.int64))
        if self._stream is not None:
            ids = _pinned(ids)  # a copy from pageable memory may wait for all queued work
        ids = ids.to(self.harvester.device, non_blocking=True)
        captured = capture(self.harvester.model, ids, self.harvester.manifest.attention)
        done = torch.cuda.current_stream(self.harvester.device).record_event() if self._stream else None
        self.finish()
        self._behind = _Launched(start, ids, captured, done)
        if self._stream is None:
            self.finish()

    def finish(self) -> None:
        """Collect the last batch."""
        if self._behind is None:
            return
        launched, self._behind = self._behind, None
        if self._stream is None:
            self._take(launched)
            return
        assert launched.done is not None
        self._stream.wait_event(launched.done)
        with torch.cuda.stream(self._stream):
            self._take(launched)
        self._stream.synchronize()  # before the copied tensors are freed

    @torch.inference_mode()
    def _take(self, batch: _Launched) -> None:
        special = is_special(batch.ids, self.harvester.manifest.model.special_tokens)
        rows, first = slice(batch.start, batch.start + len(batch.ids)), self.first + batch.start
        for site, acts in batch.captured.acts.items():
            self.moments[site].append(measure(site.layer, acts, special, site.hook, first))
            stored = acts.view(torch.uint16) if acts.dtype == torch.bfloat16 else acts
            torch.from_numpy(self.acts[site])[rows].copy_(stored, non_blocking=True)
        for layer, kept in batch.captured.attention.items():
            self.attention[layer].append(to_csr(layer, kept, first, self.harvester.manifest.model.dtype))


def _make_room(shape: tuple[int, ...], dtype: np.dtype, is_pinned: bool) -> np.ndarray:
    """Memory for a shard. If page-locked, a GPU copies into it at bus speed without blocking."""
    if not is_pinned:
        return np.empty(shape, dtype)
    try:
        return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True).numpy()
    except RuntimeError:  # the host cannot lock more pages: copies are slower, with the same result
        return np.empty(shape, dtype)


def _pinned(ids: Tensor) -> Tensor:
    try:
        return ids.pin_memory()
    except RuntimeError:  # likewise
        return ids


def describe_device(device: torch.device, dtype: torch.dtype) -> DeviceRecord:
    """The device with torch's present settings; for a CPU also how it computes products in this dtype."""
    settings, of_cpus = torch.backends.cuda.matmul, cast(Any, torch.backends.mkldnn).matmul
    # Not `torch.get_float32_matmul_precision()`, which raises an error once a program has set one of these.
    precise = (of_cpus if device.type == "cpu" else settings).fp32_precision not in ("tf32", "bf16")
    if device.type == "cuda":
        reduced = settings.allow_bf16_reduced_precision_reduction or settings.allow_fp16_reduced_precision_reduction
        name = torch.cuda.get_device_name(device)
        name += ", kernels for norms, MLPs and attention" if is_served(device, dtype) else ""
    else:
        reduced = False
        name = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
        name += ", 16-bit products in float32" if is_widened(device.type, dtype) else ""
    return DeviceRecord(device.type, name, torch.__version__, "ieee" if precise else "tf32", bool(reduced))


def other_devices_warning(recorded: dict[int, DeviceRecord], here: DeviceRecord) -> str:
    """A warning about shards from other devices; empty if all came from a device like this one."""
    others = {shard: device for shard, device in recorded.items() if device != here}
    if not others:
        return ""
    shard = min(others)
    more = " and others" if len(others) > 1 else ""  # the number is unknown: only a sample was read
    return (
        f"warning: shard {shard}{more} was computed on {others[shard]}; this is {here}. Results here differ in the "
        "last digits, and so does the store's digest: for the same bits, resume on the device that started the store"
    )
