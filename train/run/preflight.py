"""Everything about a settled run that can be refused before its first step, and before anything is written."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...cache_schema import Store
from ...cache_schema.request import validate_request
from ..data.feed import joint_request
from ..data.scaling import Stats, stats_from_moments
from ..errors import ActivationsNotFinite, ConfigInvalid, NothingToTrain
from .memory_estimate import require_room
from .settle import Settled
from .trackers import require_trackers


def check(settled: Settled, store: Store, processes: int, device: torch.device) -> dict[int, Stats]:
    """Refuse what cannot run; the statistics of each layer that is read, which are finite."""
    config, manifest = settled.config, store.manifest
    require_trackers(config.course.trackers)
    for member in config.members:
        member.config.check(manifest)
    request = joint_request(config.requests().values(), "train")
    validate_request(manifest, request)
    store.spans(request)
    _require_held_out(settled, store)
    _require_batches(settled, processes)
    _require_memory(settled, store, len(request.layers), processes, device)
    return {layer: _stats(store, layer) for layer in request.layers}


def _require_held_out(settled: Settled, store: Store) -> None:
    """A run ends with numbers on text it has not seen: that must be there before the first step."""
    manifest, config = store.manifest, settled.config
    first, last = manifest.splits["validation"]
    if first == last:
        raise NothingToTrain(
            f"the validation split of {store.url} is empty: a run ends with a measurement on it. "
            "Harvest or import more text, so that the split has windows"
        )
    windows = min(max(1, config.course.validation_tokens // manifest.context), last - first)
    store.spans(replace(joint_request(config.requests().values(), "validation"), windows=(0, windows)))


def _require_batches(settled: Settled, processes: int) -> None:
    """Each process has rows in every step, and as many whole windows as the SAEs need where they read windows."""
    tokens = settled.plan.batch_tokens
    if tokens < processes:
        raise ConfigInvalid(f"data.batch_tokens: expected at least one per process ({processes}), found {tokens}")
    wanted = {label: needs.least_windows for label, needs in settled.config.requests().items() if needs.windows}
    if not wanted:
        return
    label, least = max(wanted.items(), key=lambda pair: pair[1])
    found = settled.plan.least_windows(settled.total_steps) // processes
    if found < least:
        raise ConfigInvalid(
            f"{label}: expected {least} whole windows or more in each batch of a process, found {found} "
            f"with data.batch_tokens={tokens}: set a larger one"
        )


def _require_memory(settled: Settled, store: Store, layers: int, processes: int, device: torch.device) -> None:
    config, plan, manifest = settled.config, settled.plan, store.manifest
    element = 4 if manifest.model.dtype == "float32" else 2
    window_bytes = manifest.context * manifest.model.d_model * element * layers
    pool_bytes = (1 if plan.is_one_block else 2) * plan.max_windows * window_bytes
    shards = processes if config.course.shard_width else 1
    require_room(config.members, manifest.model.d_model, plan.batch_tokens // processes, pool_bytes, shards, device)


def _stats(store: Store, layer: int) -> Stats:
    """A layer's statistics; activations that are not finite end here, with their shard."""
    stats = stats_from_moments(store.moments(layer))
    if bool(stats.scale.isfinite().all() and stats.mean.isfinite().all()):
        return stats
    shards = range(store.manifest.shards)
    broken = [shard for shard in shards if not torch.tensor(store.shard_moments(layer, shard).mean).isfinite().all()]
    raise ActivationsNotFinite(
        f"{store.url}: activations of layer {layer} are not all finite numbers, in shard "
        f"{', '.join(map(str, broken[:8])) or 'unknown'}. Harvest again in a dtype that can hold them, such as bfloat16"
    )
