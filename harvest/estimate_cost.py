"""The cost of a harvest before it starts: bytes by array, and time.

Sizes are first bounded from the manifest alone: residuals are exact, and an attention row holds at most topk keys.
Chunks are written whole, even those of a shorter last shard. If the bound may not fit the disk, or for a dry run, a few
batches are harvested into a store in memory by the same code that harvests the rest.

Before weights are downloaded or text is read, a new store's cost is forecast from the model's configuration. Sizes
follow from the manifest: exact for residuals, an upper bound for attention. Time is measured on layers of the model's
shape with random weights (one, two, and one whose attention is kept) and scaled to the number of layers.
"""

from __future__ import annotations

import math
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import numpy as np
import torch
from huggingface_hub import constants

from ..cache_schema import AttentionSpec, Manifest, StoreFull, StoreWriter
from ..cache_schema.commits import CommitRecord
from ..cache_schema.disk_and_cloud_files import Files, LocalFiles, free_bytes_at, on_one_disk
from ..cache_schema.encode_and_read_chunks import BLOSC_HEADER_BYTES, CHECKSUM_BYTES
from ..cache_schema.layout import arrays_of, is_line
from ..cache_schema.manifest import seal
from ..cache_schema.numbers_in_words import say_size, say_time
from ..cache_schema.stored_dtypes import STORED_AS
from .corpus import source_of
from .model.load_and_truncate import Wanted, make_random, name_full_device, truncate
from .model.resolve import ModelSource
from .progress import Watch
from .shards import Harvester, harvest_shards
from .store_plan import Plan, corpus_spec, expected_manifest, settings_of_new
from .tokenise_corpus import BYTES_PER_TOKEN, spool_folder

TIMED_BATCHES = 3
RESERVE_BYTES = 64 * 2**20  # besides the arrays: records, index and file system


@dataclass(frozen=True)
class Cost:
    """The cost of a harvest, measured on a few batches."""

    bytes_per_token: dict[str, float]
    tokens_per_second: float


def bound_bytes(manifest: Manifest, shards: Sequence[int]) -> dict[str, int]:
    """The most bytes that each array of these shards takes on disk; exact for arrays stored raw."""
    by_length = Counter(stop - start for start, stop in map(manifest.shard_range, shards))
    sizes = {}
    for path, array in arrays_of(manifest).items():
        chunk = array.chunk_bytes + CHECKSUM_BYTES + (0 if array.codec == "raw" else BLOSC_HEADER_BYTES)
        chunks = {windows: 1 if is_line(path) else math.ceil(windows / array.chunks[0]) for windows in by_length}
        sizes[path] = chunk * sum(count * chunks[windows] for windows, count in by_length.items())
    return sizes


def least_bytes(manifest: Manifest) -> int:
    """The least bytes that a store takes: its tokens and its activations, compressed at best to half."""
    arrays = arrays_of(manifest)
    acts = sum(math.prod(arrays[site.path].shape) * arrays[site.path].dtype.itemsize for site in manifest.sites)
    return acts // (1 if manifest.codec == "raw" else 2) + 8 * manifest.tokens


def measure_cost(harvester: Harvester, tokens: np.ndarray) -> Cost:
    """Harvest a few batches into memory: the first is a warm-up, the others are timed."""
    batch = harvester.batch_windows
    tokens = np.resize(tokens, (batch * (1 + TIMED_BATCHES), tokens.shape[1]))
    windows = len(tokens)
    spans = {"train": (0, windows), "validation": (windows, windows), "test": (windows, windows)}
    manifest = seal(replace(harvester.manifest, windows=windows, splits=spans, shard_windows=batch))
    url = f"memory://saemill-{uuid.uuid4().hex}"
    records: list[CommitRecord] = []
    with StoreWriter.create(url, manifest, tokens, np.zeros_like(tokens)) as writer:
        trial = replace(harvester, manifest=manifest)
        harvest_shards(writer, trial, [0], lambda _: None)
        start = time.perf_counter()
        harvest_shards(writer, trial, range(1, 1 + TIMED_BATCHES), records.append)
        seconds = time.perf_counter() - start
    fsspec.filesystem("memory").rm(url, recursive=True)
    tokens_timed = TIMED_BATCHES * batch * manifest.context
    sizes = {path: sum(record.arrays[path].bytes for record in records) for path in records[0].arrays}
    return Cost({path: size / tokens_timed for path, size in sizes.items()}, tokens_timed / seconds)


def weights_on_store_disk(source: ModelSource, files: Files) -> int:
    """Bytes of weights still to be downloaded onto the store's own disk."""
    if source.to_download is None or not isinstance(files, LocalFiles):
        return 0
    return source.to_download if on_one_disk(files.root, Path(constants.HF_HUB_CACHE)) else 0


def require_space(url: str, free: int | None, needed: int, *, is_started: bool = False, weights: int = 0) -> None:
    """Refuse a harvest that does not fit the disk, together with `weights` that go onto it too. `free` is None for an
    object store, which is unlimited. An existing store has another remedy: it keeps its settings."""
    if free is not None and needed + weights > free:
        remedy = "Ask for fewer --tokens or layers, try --codec zstd, or give another --out"
        if is_started:
            remedy = (
                "Free some space and run the same command again: it resumes where it stopped. Or remove the store "
                "first, then ask for fewer --tokens or layers, or try --codec zstd; or give another --out"
            )
        also = f" and {say_size(weights)} for the model's weights (HF_HOME may be on another)" if weights else ""
        raise StoreFull(
            f"the harvest needs {say_size(needed)}{also}, but the disk of {url} has {say_size(free)} free. {remedy}"
        )


def is_bound_to_fit(files: Files, manifest: Manifest, shards: Sequence[int]) -> bool:
    """Whether the disk has room for the most that the shards can take."""
    free = files.free_bytes()
    return free is None or needed_bytes(bound_bytes(manifest, shards)) <= free


def tokens_in(manifest: Manifest, shards: Sequence[int]) -> int:
    return sum(stop - start for start, stop in map(manifest.shard_range, shards)) * manifest.context


def sizes_of(cost: Cost, manifest: Manifest, shards: Sequence[int]) -> dict[str, int]:
    """The bytes that each array of these shards will take: as bounded if raw, else as measured, because the padding of
    chunks compresses to nothing."""
    tokens, most, arrays = tokens_in(manifest, shards), bound_bytes(manifest, shards), arrays_of(manifest)
    return {
        path: most[path] if path in arrays and arrays[path].codec == "raw" else int(per_token * tokens)
        for path, per_token in cost.bytes_per_token.items()
    }


def needed_bytes(sizes: Mapping[str, int]) -> int:
    """The free space required for arrays of these sizes."""
    total = sum(sizes.values())
    return total + RESERVE_BYTES if total else 0


TRIAL_VOCABULARY = 256  # for the layers that are timed: a whole embedding would take memory but no time
LONG_WORK = 1e13  # multiplications, a minute or two on a processor: from here on, time the layers first


def announce(plan: Plan, device: torch.device, files: Files, watch: Watch) -> None:
    """Print a new store's cost; refuse one that the disk cannot hold if the corpus is sure to fill it."""
    manifest = forecast_manifest(plan)
    if source_of(plan.corpus).pinned:
        weights = weights_on_store_disk(plan.source, files)
        require_space(files.url, files.free_bytes(), least_bytes(manifest), weights=weights)
    watch.say(cost_lines(plan, manifest, files.free_bytes(), device))
    announce_tokens(plan, files, watch)
    if 12 * plan.facts.d_model**2 * plan.wanted.num_layers * manifest.tokens > LONG_WORK:
        rate = tokens_per_second(plan, manifest, device)
        seconds = say_time(manifest.tokens / rate)
        watch.say(f"time: about {seconds} for one process on {device}, by its layers ({rate:,.0f} tokens/s)")


def announce_tokens(plan: Plan, files: Files, watch: Watch, refuses: bool = True) -> None:
    """Print the disk space that a remote store's tokens take on this machine until the store has them; if it `refuses`,
    raise an error when the disk lacks it.

    A local store's tokens are next to it, on a disk that needs far more space for the store itself.
    """
    if isinstance(files, LocalFiles):
        return
    folder = spool_folder(files)
    kept = sum(file.stat().st_size for file in folder.glob("*"))
    needed, free = BYTES_PER_TOKEN * plan.windows * plan.config.context, kept + free_bytes_at(folder)
    if refuses and source_of(plan.corpus).pinned and needed > free:
        raise StoreFull(
            f"tokenising needs {say_size(needed)} in {folder}, whose disk has {say_size(free)} available. "
            "Set TMPDIR to a folder on another disk, or ask for fewer --tokens"
        )
    watch.say(f"to tokenise: {say_size(needed)} in {folder} until the store has it; {say_size(free)} available")


def forecast_manifest(plan: Plan) -> Manifest:
    """The manifest of a new store, if the corpus holds all tokens asked for."""
    spec = corpus_spec(plan, plan.corpus.dataset, None, settings_of_new(plan, {}))
    return expected_manifest(plan, spec, plan.windows)


def bytes_by_array(manifest: Manifest) -> dict[str, int]:
    """The most bytes that each array takes, with the arrays of a layer's attention added up."""
    sizes: dict[str, int] = {}
    for path, most in bound_bytes(manifest, range(manifest.shards)).items():
        name = path.rsplit("/", 1)[0] if path.startswith("attention/") else path
        sizes[name] = sizes.get(name, 0) + most
    return sizes


def cost_lines(plan: Plan, manifest: Manifest, free: int | None, device: torch.device) -> list[str]:
    """Lines to print: tokens, size by array, memory and downloads."""
    sizes = bytes_by_array(manifest)
    total = sum(sizes.values())
    arrays = ", ".join(f"{name} {say_size(most)}" for name, most in sizes.items() if most >= 0.01 * total)
    at = "" if free is None else f"; {say_size(free)} free"
    memory = memory_of_shards(manifest, is_pinned=device.type == "cuda")
    lines = [
        f"to harvest: {manifest.tokens:,} tokens ({describe_splits(manifest)}) if the corpus is large enough",
        f"to write: {say_size(total)} at most ({arrays}){at}",
        f"memory: about {say_size(memory)} for two shards; less with --shard-windows",
    ]
    if plan.encoder.is_bos_of_configuration:
        bos = plan.encoder.backend.id_to_token(plan.encoder.bos_token)
        lines.append(f"BOS: {bos}, from the model's configuration, because its tokenizer names none")
    if plan.source.to_download is not None:
        lines.append(f"to download: {say_size(plan.source.to_download)} of weights into {constants.HF_HUB_CACHE}")
    return lines


def memory_of_shards(manifest: Manifest, is_pinned: bool) -> int:
    """Memory in use while one shard is computed and the previous one is written. If page-locked, for a GPU, each site's
    activations take a power of two."""
    windows = min(manifest.shard_windows, manifest.windows)
    row = windows * manifest.context * STORED_AS[manifest.model.dtype].itemsize
    sizes = [row * manifest.width_of(site.hook) for site in manifest.sites]
    acts = sum(1 << (size - 1).bit_length() if is_pinned else size for size in sizes)
    lines = (array for path, array in arrays_of(manifest).items() if path.startswith("attention/"))
    return 2 * (acts + sum(array.chunk_bytes for array in lines))


def describe_splits(manifest: Manifest) -> str:
    counts = {name: (end - start) * manifest.context for name, (start, end) in manifest.splits.items()}
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def tokens_per_second(plan: Plan, manifest: Manifest, device: torch.device) -> float:
    """The rate of a whole harvest, from the times of one layer, of two, and of one whose attention is kept."""
    kept = bool(plan.wanted.attention_layers)
    one = _seconds_per_token(plan, manifest, device, 1, keep_attention=False)
    two = _seconds_per_token(plan, manifest, device, 2, keep_attention=False)
    keeping = _seconds_per_token(plan, manifest, device, 1, keep_attention=True) - one if kept else 0.0
    layers = one + (plan.wanted.num_layers - 1) * max(two - one, 0.0)
    return 1 / (layers + len(plan.wanted.attention_layers) * max(keeping, 0.0))


def _seconds_per_token(
    plan: Plan, manifest: Manifest, device: torch.device, layers: int, *, keep_attention: bool
) -> float:
    wanted = Wanted((layers - 1,), (layers - 1,) if keep_attention else ())
    dtype = getattr(torch, plan.config.dtype)
    with name_full_device(
        device, "layers to be timed", "Choose another --device, or wait for other programs on it to finish"
    ):
        model = truncate(make_random(plan.source.folder, layers, TRIAL_VOCABULARY, dtype, device), wanted)
    attention = replace(manifest.attention, layers=wanted.attention_layers) if keep_attention else AttentionSpec()
    trial = replace(manifest, layers=wanted.resid_layers, attention=attention, hooks={})
    windows = (plan.windows_per_batch, plan.config.context)
    tokens = np.random.default_rng(0).integers(TRIAL_VOCABULARY, size=windows, dtype=np.uint32)
    return 1 / measure_cost(Harvester(model, trial, device), tokens).tokens_per_second
