"""A whole harvest: model and corpus to a store, from the start or resumed.

1. Choose the model, or use the existing store's; read its configuration and tokenizer, refuse layers that it does not
   have, report the cost of a new store, and find its corpus. Only then download weights, and for an existing store
   only if shards are left to harvest.
2. If there is no store yet, the first worker tokenises and packs the corpus and writes all tokens; the others wait for
   it. If there is one, its settings must be the same, and nothing is tokenised again.
3. Check that the disk can hold the pending shards of all workers.
4. Load the model, truncated to the wanted layers, and harvest this worker's share of the pending shards; a worker with
   a share given by --worker then helps with those of others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..cache_schema import Manifest, Store, StoreBusy, StoreError, StoreWriter
from ..cache_schema.commits import CommitRecord, read_devices
from ..cache_schema.disk_and_cloud_files import Files, open_files
from ..cache_schema.keep_freed_memory import SMALLER_THAN_SHARDS, keep_large_blocks
from ..cache_schema.numbers_in_words import counted, say_size
from ..cache_schema.open_and_check_root import has_root, read_root
from .config import HarvestConfig
from .create_or_resume_store import (
    create_store,
    find_corpus,
    lock_spool,
    require_place,
    resume_store,
    wait_for_tokens,
)
from .errors import HarvestError, ModelDiffers, ModelUnavailable
from .estimate_cost import announce, is_bound_to_fit, measure_cost, needed_bytes, require_space, sizes_of, tokens_in
from .model.load_and_truncate import Wanted, find_device, load_model
from .model.resolve import AUTO, Choice, ModelSource, choose, choose_again, fetch, fetch_description, fetch_recorded
from .process import Process, open_process
from .progress import Stage, Watch
from .shards import Harvester, harvest_shards, other_devices_warning
from .store_plan import BATCH, Plan, make_plan
from .tokenise_corpus import spool_folder


@dataclass(frozen=True)
class Finished:
    """The outcome of a harvest."""

    url: str
    shards: int  # in the store
    committed: int  # of these, by any worker
    speaks: bool  # whether this process reports: of a launch, the first and any that finished the store
    fell_back: tuple[str, ...] = ()  # the banner, repeated at the end if a fallback model was used


def harvest(config: HarvestConfig, watch: Watch | None = None) -> Finished:
    """Write a store, or resume one."""
    files = open_files(config.out)
    require_place(files)
    with open_process(config.device, config.worker) as process:
        watch = watch or Watch(is_quiet=not process.speaks)
        if config.model == AUTO and not process.is_first:
            wait_for_tokens(files, watch)  # the first worker decides for all
        is_started = has_root(files)
        plan = decide(config, watch)
        writer = None
        if not is_started:
            writer, plan = _begin(plan, process, files, watch)
        writer = writer or resume_store(plan, process, files, watch)
        try:
            written = _harvest_share(plan, process, writer, watch)
        finally:
            writer.close()
        with Store.open(config.out) as store:
            ended = bool(written) and bool(store.committed.all())
            counts = store.manifest.shards, int(store.committed.sum())
            return Finished(store.url, *counts, process.speaks or ended, plan.fell_back)


def _begin(plan: Plan, process: Process, files: Files, watch: Watch) -> tuple[StoreWriter | None, Plan]:
    """The first worker's writer, and the plan with its weights. If another process creates the store: None, once the
    tokens are written, and that store's plan, because the other may have found another commit of the model."""
    if process.is_first:
        announce(plan, process.device, files, watch)
        corpus = find_corpus(plan, files)  # it may not exist: check before hours of download
        is_long = plan.source.to_download is not None
        with lock_spool(spool_folder(files)) if is_long else nullcontext():  # shows waiting workers that one is running
            plan = with_weights(plan)
        if writer := create_store(plan, corpus, files, watch):
            return writer, plan
    else:
        plan = with_weights(plan)
        wait_for_tokens(files, watch)
    is_same = read_root(files).manifest.model == plan.model_spec
    return None, plan if is_same else decide(plan.config, watch)


def decide(config: HarvestConfig, watch: Watch) -> Plan:
    """Choose the model and check it against the settings. Model and commit are decided once per store."""
    files = open_files(config.out)
    choice = None
    if has_root(files):
        manifest = read_root(files).manifest
        choice = choose_again(config.model, manifest.model)
        config = replace(config, shard_windows=config.shard_windows or manifest.shard_windows)
    choice = choice or choose(config.model)
    watch.say(choice.banner)
    return make_plan(config, fetch_description(choice, watch.say), choice)


def with_weights(plan: Plan) -> Plan:
    """The plan with the model's weights on this machine."""
    if plan.source.to_download is None:
        return plan
    return replace(plan, source=fetch(Choice(plan.source.id, plan.source.revision)))


def reharvest(
    url: str,
    shards: Sequence[int],
    device: str | None = None,
    model: str | None = None,
    undo: Callable[[], None] = lambda: None,
) -> None:
    """Harvest the given shards again from the store's own tokens and model.

    `undo` removes the present ones, and is called once the model is loaded.
    """
    manifest = read_root(open_files(url)).manifest
    if BATCH not in manifest.corpus.settings:
        raise StoreError(
            f"{url} was not written by a harvest: expected {BATCH} in the settings of its corpus, found none. No shard "
            "was removed. Remove the damaged ones with --remove-only, then write them again like the others"
        )
    try:
        harvester = make_harvester(manifest, fetch_recorded(manifest.model, model), find_device(device or "auto"))
    except HarvestError as error:
        where = (
            "Give the model's present location with --model; or remove"
            if isinstance(error, (ModelUnavailable, ModelDiffers))
            else "Or remove"
        )
        raise StoreError(
            f"{error}. No shard was removed. {where} the damaged shards with --remove-only, then run the same "
            "harvest, which writes the missing ones"
        ) from error
    undo()
    with StoreWriter.open(url) as writer:
        try:
            _warn_of_other_devices(writer, harvester, shards, Watch())
            busy = harvest_shards(writer, harvester, sorted(shards), lambda _: None)
        except HarvestError as error:
            raise StoreError(f"{error}. Running the same harvest again also writes the missing shards") from error
    if busy:
        raise StoreBusy(
            f"shards {busy} of {url} are committed or held by another writer. Wait, then try again{writer.if_killed}"
        )


def make_harvester(manifest: Manifest, source: ModelSource, device: torch.device) -> Harvester:
    """Load the part of the model that a store needs."""
    hooks = {hook: spec.layers for hook, spec in manifest.hooks.items()}
    wanted = Wanted(manifest.layers, manifest.attention.layers, hooks)
    return Harvester(load_model(source.folder, wanted, getattr(torch, manifest.model.dtype), device), manifest, device)


def _harvest_share(plan: Plan, process: Process, writer: StoreWriter, watch: Watch) -> int:
    """Harvest this worker's pending shards, then help with the others'; return the number of shards written."""
    manifest, pending = writer.manifest, writer.pending()
    shards = [shard for shard in pending if process.worker.takes(shard)]
    if process.takes_rest:
        shards = shards or pending
    if not shards:
        return 0
    keep_large_blocks(SMALLER_THAN_SHARDS)
    harvester = make_harvester(manifest, with_weights(plan).source, process.device)
    first_committed = sorted(set(range(manifest.shards)) - set(pending))[:1]
    _warn_of_other_devices(writer, harvester, [*first_committed, *shards], watch)
    if not is_bound_to_fit(writer.files, manifest, pending):  # all workers fill the same disk
        with Store(writer.files) as store:
            cost = measure_cost(harvester, store.beginning(shards[0])[0])
        needed = needed_bytes(sizes_of(cost, manifest, pending))
        require_space(writer.files.url, writer.files.free_bytes(), needed, is_started=True)
    sizes: Counter[str] = Counter()
    elsewhere: list[int] = []
    written, remaining, is_first_pass = 0, len(shards), True
    while shards:
        with watch.stage("harvesting", tokens_in(manifest, shards), stays=True) as stage:
            report = partial(report_shard, stage, sizes, manifest.context, writer.files)
            elsewhere = harvest_shards(writer, harvester, shards, report)
        done = len(shards) - len(elsewhere)
        written, remaining = written + done, remaining - done
        if not process.takes_rest or not (done or is_first_pass):  # the first pass is over this worker's own share
            break
        shards, remaining = writer.left()
        is_first_pass = False
    if remaining:
        untried = remaining - len(elsewhere)  # on an object store each attempt costs requests
        note = f"; {untried} not tried, whose claims may have lapsed" if untried else ""
        left = f"left to other writers, which hold or have committed them: {counted(remaining, 'shard')}"
        watch.say(f"{left}{note}{writer.if_killed}")
    return written


def _warn_of_other_devices(writer: StoreWriter, harvester: Harvester, shards: Sequence[int], watch: Watch) -> None:
    """Warn if other shards of the store were computed on another kind of device."""
    if warning := other_devices_warning(read_devices(writer.files, shards), harvester.computes_on):
        watch.say(warning)


def report_shard(stage: Stage, sizes: Counter[str], context: int, files: Files, record: CommitRecord) -> None:
    """Report a committed shard; `sizes` adds up the bytes of all of them."""
    start, stop = record.windows
    sizes["bytes"] += sum(array.bytes for array in record.arrays.values())
    free = files.free_bytes()
    disk = "" if free is None else f", {say_size(free)} free"
    stage((stop - start) * context, f"{say_size(sizes['bytes'])} written{disk}")
