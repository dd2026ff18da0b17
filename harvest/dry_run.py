"""A dry run: the bytes and time that a harvest would take, without writing a store.

If the model's weights are on this machine, a few batches of the corpus are harvested; otherwise the estimate is from
its configuration, and only checks that the corpus exists. A GGUF file is converted once, as for a harvest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from ..cache_schema import Manifest, Store
from ..cache_schema.disk_and_cloud_files import Files, open_files
from ..cache_schema.info import make_table, sum_by_place
from ..cache_schema.numbers_in_words import counted, say_busy, say_size, say_time
from ..cache_schema.open_and_check_root import has_root
from .config import HarvestConfig
from .corpus.source import Corpus, part_of, revision_of
from .create_or_resume_store import find_corpus, require_place, require_same_plan
from .errors import CorpusEmpty
from .estimate_cost import (
    Cost,
    announce_tokens,
    bytes_by_array,
    describe_splits,
    forecast_manifest,
    least_bytes,
    measure_cost,
    needed_bytes,
    sizes_of,
    tokens_in,
    tokens_per_second,
    weights_on_store_disk,
)
from .pack_windows import Packer
from .process import open_process
from .progress import Watch
from .run import decide, make_harvester
from .store_plan import Plan, corpus_spec, expected_manifest, settings_of_new
from .tokenise_corpus import window_remedy

TRIAL_DOCUMENTS = 2000
DOCUMENTS_AT_ONCE = 20


@dataclass(frozen=True)
class Work:
    """The remaining work of a harvest."""

    manifest: Manifest
    shards: Sequence[int]  # not committed yet
    is_started: bool = False  # whether the store exists already


@dataclass(frozen=True)
class Estimate:
    work: Work
    cost: Cost
    free_bytes: int | None  # None if the store is not on a disk of this machine
    to_download: int | None = None  # bytes of weights; if not None, sizes of attention are upper bounds
    weights_on_store_disk: int = 0  # of these, the bytes that go onto the store's disk
    busy: str = ""  # a warning, if the rate was measured on a busy machine
    speaks: bool = True  # whether this process reports: only the first of a launch does

    @property
    def least_bytes(self) -> int:
        """The least that is needed: a disk is refused only if it has less."""
        if self.to_download is None:
            return self.needed_bytes
        return least_bytes(self.work.manifest) * len(self.work.shards) // self.work.manifest.shards

    @property
    def needed_bytes(self) -> int:
        return needed_bytes(self.sizes)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes by array of the remaining work."""
        return sizes_of(self.cost, self.work.manifest, self.work.shards)

    @cached_property
    def bytes_per_token(self) -> dict[str, float]:
        """Bytes per token by array, on average over the whole store."""
        manifest = self.work.manifest
        whole = sizes_of(self.cost, manifest, range(manifest.shards))
        return {path: size / manifest.tokens for path, size in whole.items()}

    @property
    def seconds(self) -> float:
        return tokens_in(self.work.manifest, self.work.shards) / self.cost.tokens_per_second


def dry_run(config: HarvestConfig, watch: Watch | None = None) -> Estimate:
    """Time a few batches of the corpus and scale up to the remaining work."""
    busy, files = say_busy(), open_files(config.out)
    require_place(files)
    with open_process(config.device, config.worker) as process:
        watch = watch or Watch(is_quiet=not process.speaks)
        plan = decide(config, watch)
        is_started = has_root(files)
        if process.is_first and not is_started:
            announce_tokens(plan, files, watch, refuses=False)
        corpus = None if is_started else find_corpus(plan, files)  # raises if there is none
        if plan.source.to_download is None:
            work, sample = _remaining_work(plan, files, watch) if corpus is None else _all_work(plan, corpus, watch)
            cost = measure_cost(make_harvester(work.manifest, plan.source, process.device), sample)
        else:
            manifest = forecast_manifest(plan)
            work = _remaining_work(plan, files, watch)[0] if corpus is None else Work(manifest, range(manifest.shards))
            sizes = {path: most / work.manifest.tokens for path, most in bytes_by_array(work.manifest).items()}
            cost = Cost(sizes, tokens_per_second(plan, work.manifest, process.device))
    weights = weights_on_store_disk(plan.source, files) if work.shards else 0
    return Estimate(work, cost, files.free_bytes(), plan.source.to_download, weights, busy, process.speaks)


def document_of(estimate: Estimate) -> dict[str, Any]:
    """For scripts: the numbers that `render` shows."""
    work, cost = estimate.work, estimate.cost
    return {
        "model": work.manifest.model.id,
        "tokens": work.manifest.tokens,
        "tokens_to_go": tokens_in(work.manifest, work.shards),
        "shards": work.manifest.shards,
        "shards_to_go": len(work.shards),
        "bytes_per_token": estimate.bytes_per_token,
        "bytes": sum(estimate.sizes.values()),
        "bytes_needed": estimate.needed_bytes,
        "free_bytes": estimate.free_bytes,
        "bytes_to_download": estimate.to_download,
        "tokens_per_second": cost.tokens_per_second,
        "seconds": estimate.seconds,
        "busy": estimate.busy,
    }


def render(estimate: Estimate) -> RenderableType:
    """Two small tables: the facts, and the size of each array."""
    work, cost = estimate.work, estimate.cost
    manifest = work.manifest
    sizes = make_table("Size", "array", "bytes per token", "size")
    per_token, total = estimate.bytes_per_token, say_size(sum(estimate.sizes.values()))
    rates = sum_by_place(per_token)
    for place, size in sum_by_place(estimate.sizes).items():
        sizes.add_row(place, f"{rates[place]:,.1f}", say_size(round(size)))
    sizes.add_section()
    sizes.add_row("all", f"{sum(per_token.values()):,.1f}", total)
    facts = Table.grid(padding=(0, 2))
    free = "not a disk of this machine" if estimate.free_bytes is None else say_size(estimate.free_bytes)
    rest = {"to go": f"{counted(len(work.shards), 'shard')}, which size and time are for"} if work.is_started else {}
    weights = {}
    if estimate.to_download is not None:
        weights = {"download": f"{say_size(estimate.to_download)} of weights, not downloaded for this estimate"}
    rows = {
        "tokens": f"{manifest.tokens:,}" + ("" if work.is_started else " (if the corpus is large enough)"),
        "shards": f"{manifest.shards:,} of {manifest.shard_windows} windows of {manifest.context} tokens",
        "splits": describe_splits(manifest),
        **rest,
        **weights,
        "size": total + (" at most" if weights else ""),
        "needs": f"{say_size(estimate.needed_bytes)} free, with a reserve for records and file system",
        "free": free,
        "rate": f"{cost.tokens_per_second:,.0f} tokens/s on this device",
        "time": f"{say_time(estimate.seconds)} for one process" + (f"; {estimate.busy}" if estimate.busy else ""),
    }
    for name, value in rows.items():
        facts.add_row(f"[bold]{name}[/bold]", value)
    return Group(sizes, facts)


def _all_work(plan: Plan, corpus: Corpus, watch: Watch) -> tuple[Work, np.ndarray]:
    """A harvest from the start."""
    revision = revision_of(corpus, watch.say)
    spec = corpus_spec(plan, corpus.id, revision, settings_of_new(plan, corpus.settings, part_of(corpus)))
    manifest = expected_manifest(plan, spec, plan.windows)
    return Work(manifest, range(manifest.shards)), _first_windows(plan, corpus)


def _remaining_work(plan: Plan, files: Files, watch: Watch) -> tuple[Work, np.ndarray]:
    """The rest of an existing store; refused, as by the harvest, if its settings differ."""
    with Store(files) as store:
        require_same_plan(plan, store.manifest, files.url, watch)
        shards = np.flatnonzero(~store.committed).tolist()
        tokens, _ = store.beginning(shards[0] if shards else 0)
    return Work(store.manifest, shards, is_started=True), tokens


def _first_windows(plan: Plan, corpus: Corpus) -> np.ndarray:
    """Enough windows of the corpus for one batch: repeating fewer would compress too well."""
    packer = Packer(plan.config.context, plan.encoder.bos_token, plan.config.packing)
    documents, read = islice(corpus.documents(), TRIAL_DOCUMENTS), 0
    found = np.empty((0, plan.config.context), np.uint32)
    while len(found) < plan.windows_per_batch and (texts := list(islice(documents, DOCUMENTS_AT_ONCE))):
        read += len(texts)
        windows = packer.pack(plan.encoder.encode(texts), [0] * len(texts))
        found = np.concatenate([found, windows.tokens])
    if not len(found):
        raise CorpusEmpty(
            f"the first {read:,} documents of {corpus.id} fill no window of {plan.config.context} tokens. "
            f"{window_remedy(plan.config.packing)}"
        )
    return found[: plan.windows_per_batch]
