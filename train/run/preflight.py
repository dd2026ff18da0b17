"""Checks of a settled run, before its first step and before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ...cache_schema import Manifest, Store
from ...cache_schema.csr import index_dtype
from ...cache_schema.massive_activations import count_ordinary, measure_massive, sample, sample_whole
from ...cache_schema.requests_and_spans import validate_request
from ...cache_schema.sites import Place, place_of, say_place, site_of
from ...cache_schema.stored_dtypes import STORED_AS
from ..config.run_config import Member, RunConfig
from ..data.batch_stream import held_out_windows, joint_request
from ..data.scaling import Stats, bounds_of, stats_from_moments
from ..errors import ActivationsNotFinite, ConfigInvalid, NothingToTrain, name_sae
from .fill_config_from_store import Settled
from .fits_in_memory import require_room
from .log_and_show_progress import require_trackers

ALIKE = 1e-12  # share of the mean square that rounding leaves as the variance of identical rows
HELD_OUT_ROWS = 4096  # of the final measurement at once
LEAST_HELD_OUT = 2  # tokens; a single one has no variance to explain


def check(
    settled: Settled, store: Store, members: Sequence[Member], processes: int, parts: int, device: torch.device
) -> dict[Place, Stats]:
    """Refuse a run that cannot work; return the (finite) statistics of each layer that is read.

    `members` are those of this process; their rows are divided among `processes`, or their latents into `parts`.
    """
    config, manifest = settled.config, store.manifest
    require_trackers(config.course.trackers)
    for member in config.members:
        with name_sae(member.label):
            member.config.check(manifest)
    request = joint_request(config.needs().values(), "train")
    validate_request(manifest, request)
    store.spans(request)
    _require_held_out(settled, store)
    _require_batches(settled, processes)
    _require_memory(settled, store, members, processes, parts, device)
    places = [place_of(*site) for site in request.sites]
    multiple, is_whole = config.data.massive_norms, settled.samples_whole_shards
    stats = {place: layer_stats(store, place, multiple, samples_whole_shards=is_whole) for place in places}
    for site in request.sites:
        moments = store.moments(site.layer, site.hook)
        if moments.total_variance <= ALIKE * moments.mean_square_norm:
            raise NothingToTrain(
                f"{say_place(place_of(*site))} of {store.url}: expected activations that differ, found "
                f"{moments.count:,} rows that are all alike: nothing to train. Harvest or import another layer"
            )
    _require_ordinary_held_out(settled, store, bounds_of(stats))
    return stats


def _require_held_out(settled: Settled, store: Store) -> None:
    """Require the held-out text that a finished run is measured on."""
    first, last = store.manifest.splits["validation"]
    if first == last:
        raise NothingToTrain(
            f"the validation split of {store.url} is empty, but a run ends with a measurement on it. "
            "Harvest or import more text, so that the split has windows, or import it with --validation above 0"
        )
    request = joint_request(settled.config.needs().values(), "validation")
    store.spans(replace(request, windows=(0, _held_out_windows(settled, store))))


def _require_batches(settled: Settled, processes: int) -> None:
    """Require that each process gets rows in every step, and as many whole windows as its SAEs need."""
    tokens = settled.plan.batch_tokens
    if tokens < processes:
        raise ConfigInvalid(f"data.batch_tokens: expected at least one per process ({processes}), found {tokens}")
    wanted = {label: needs.least_windows for label, needs in settled.config.needs().items() if needs.windows}
    if not wanted:
        return
    label, least = max(wanted.items(), key=lambda pair: pair[1])
    found = settled.plan.least_windows(settled.total_steps) // processes
    if found < least:
        raise ConfigInvalid(
            f"{label}: expected at least {least} whole windows per process in each batch, found {found} "
            f"with data.batch_tokens={tokens}: set a larger one"
        )


def _require_memory(
    settled: Settled, store: Store, members: Sequence[Member], processes: int, parts: int, device: torch.device
) -> None:
    plan, manifest = settled.plan, store.manifest
    request = joint_request((member.config.needs() for member in members), "train")
    element = STORED_AS[manifest.stored_dtype].itemsize
    window_bytes = manifest.context * element * sum(manifest.width_of(site.hook) for site in request.sites)
    if request.attention_layers:
        entry = 2 + index_dtype(manifest.context).itemsize  # a weight, and the position of a key
        row = min(manifest.attention.topk, manifest.context) * entry + 8 + 2  # where it ends, and its mass
        window_bytes += len(request.attention_layers) * manifest.attention.heads * manifest.context * row
    pool_bytes = (1 if plan.is_one_block else 2) * plan.max_windows * window_bytes
    windows = min(manifest.shard_windows, _held_out_windows(settled, store))  # held-out batches lie in one shard
    at_once = max(held_out_rows(settled.config, manifest, parts > 1), manifest.context)
    held_out = min(at_once, windows * manifest.context)
    rows, team = plan.batch_tokens // processes, processes * parts
    require_room(members, manifest.width_of, rows, pool_bytes, parts, device, held_out, team)


def held_out_rows(config: RunConfig, manifest: Manifest, is_split: bool) -> int:
    """Rows per batch of the final measurement, at most `HELD_OUT_ROWS`, or two windows for SAEs that read another's:
    the dense codes of a larger batch need more memory than training. Fewer for a split dictionary, which is then joined
    in one process."""
    most = manifest.context if is_split else max(HELD_OUT_ROWS, 2 * manifest.context)
    return min(config.data.batch_tokens, most)


def _held_out_windows(settled: Settled, store: Store) -> int:
    return held_out_windows(store.manifest, settled.config.course.validation_tokens)


def _require_ordinary_held_out(settled: Settled, store: Store, bounds: Mapping[Place, float]) -> None:
    """Require enough rows in the first held-out windows that are neither special nor massive, for every SAE."""
    windows = _held_out_windows(settled, store)
    kinds = {needs.kind(bounds).layers: label for label, needs in settled.config.needs().items()}
    for layers, label in kinds.items():
        of_layers = {layer: bounds[layer] for layer in layers}
        found = count_ordinary(store, of_layers, "validation", windows, LEAST_HELD_OUT)
        if found < LEAST_HELD_OUT:
            others, remedy = "special", "Set a larger course.validation_tokens, or harvest or import more text"
            if layers:
                multiple, places = settled.config.data.massive_norms, ", ".join(map(say_place, layers))
                others += f", or massive: their norm is beyond {multiple:g} times the median of {places}"
                remedy += ", or set data.massive_norms=inf to train and measure on all rows"
            raise NothingToTrain(
                f"{label}: expected at least {LEAST_HELD_OUT} tokens to measure a run on, found {found} in the first "
                f"{windows} windows of the validation split of {store.url}. The others are {others}. {remedy}"
            )


def layer_stats(
    store: Store, layer: Place, massive_norms: float | None, *, samples_whole_shards: bool = False
) -> Stats:
    """A layer's statistics, over its ordinary rows if massive ones are left out. Refuses activations that are not
    finite, and names their shards."""
    site = site_of(layer)
    moments = store.moments(site.layer, site.hook)
    if moments.mean_norm == 0:
        raise NothingToTrain(
            f"{say_place(layer)} of {store.url}: expected rows that are not zero, found none among {moments.count:,}. "
            "Harvest or import another layer"
        )
    stats = stats_from_moments(moments)
    if not bool(stats.scale.isfinite().all() and stats.mean.isfinite().all()):
        shards = range(store.manifest.shards)
        means = {shard: store.shard_moments(site.layer, shard, site.hook).mean for shard in shards}
        broken = ", ".join([str(shard) for shard, mean in means.items() if not torch.tensor(mean).isfinite().all()][:8])
        raise ActivationsNotFinite(
            f"{store.url}: activations of {say_place(layer)} are not all finite numbers, in shard "
            f"{broken or 'unknown'}. Harvest again in a dtype that can hold them, such as bfloat16"
        )
    if massive_norms is None:
        return stats
    spans = (sample_whole if samples_whole_shards else sample)(store.manifest, layer, store.committed)
    massive = measure_massive(store, layer, massive_norms, spans)
    if not massive.ordinary.mean_norm > 0:
        raise NothingToTrain(
            f"{say_place(layer)} of {store.url}: {massive}. No others are left to train on. "
            "Set data.massive_norms=inf to train on all rows"
        )
    return replace(stats_from_moments(massive.ordinary), massive=massive)
