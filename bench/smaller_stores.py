"""What stores of half the size cost: SAEs trained on bfloat16, fp8 and int8 forms of the same activations are evaluated
on the exact ones. Also, how much faster such stores are read.

The small stores are written from the exact one by the harvest's own writer, from the same input. SAEs of one seed start
alike and draw the same batches in the same order, so stores are compared seed by seed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import get_args

import click
import numpy as np
import store_speed as stores
import torch
from timing_and_tables import Row, compare, conclude, gather_facts, mean_and_range, speeds_of, take_turns

from saemill import Store, harvest, train
from saemill.cache_schema import Request, ShardContent, StoreWriter, from_float32
from saemill.cache_schema import Store as StoredArrays
from saemill.cache_schema.commits import read_index
from saemill.cache_schema.keep_freed_memory import keep_large_blocks
from saemill.cache_schema.manifest import AttentionSpec
from saemill.cache_schema.sites import Place
from saemill.cache_schema.stored_dtypes import SmallDtype
from saemill.evaluate.context.context import Context
from saemill.evaluate.context.write_and_read_results import metric_of
from saemill.evaluate.evals.core.evaluation import Config
from saemill.evaluate.run.find_saes_to_evaluate import find_subjects
from saemill.evaluate.run.run_evals import run_evals
from saemill.harvest.progress import Watch
from saemill.train.data.batches_for_others import Batches
from saemill.train.data.scaling import Stats
from saemill.train.data.shuffle_order import Plan, measure_split
from saemill.train.run.preflight import layer_stats

KINDS: tuple[SmallDtype, ...] = get_args(SmallDtype)
EXACT = "bfloat16"
METRICS = {
    "explained variance": "saemill_metrics.explained_variance",
    "CE": "model_performance_preservation.ce_loss_with_sae",
    "KL": "model_behavior_preservation.kl_div_with_sae",
    "L0": "sparsity.l0",
}
FASTER = 1.6


def write_small(exact: Store, folder: Path, kind: SmallDtype) -> None:
    """Write the residuals of a store again, as codes."""
    manifest = exact.manifest
    beginnings = [exact.beginning(shard) for shard in range(manifest.shards)]
    tokens, documents = (np.concatenate(parts) for parts in zip(*beginnings, strict=True))
    small = replace(manifest, stored_as=kind, attention=AttentionSpec(), hooks={})
    with StoreWriter.create(folder, small, tokens, documents) as writer:
        for part in exact.stream(Request(layers=manifest.layers)):
            rows, shard = slice(part.span.start, part.span.stop), part.span.shard
            sites = Request(layers=manifest.layers).sites
            acts = {site: part.at(site) for site in sites}
            moments = {site: exact.shard_moments(site.layer, shard) for site in sites}
            with writer.claim(shard):
                writer.write(shard, ShardContent(tokens[rows], documents[rows], acts, moments))


def measure(context: Context, run: Path) -> list[dict[str, float]]:
    """The metrics of each seed on the activations of the context's store, whichever store the run was trained on."""
    subjects = find_subjects([str(run)], run.parent)
    rows = run_evals(context, subjects, {"core": Config(ablations=("zero",))})
    assert all(row.document for row in rows), [row.reason for row in rows]
    return [
        {name: metric_of(row.document or {}, path) or float("nan") for name, path in METRICS.items()} for row in rows
    ]


def bytes_per_token(store: StoredArrays) -> float:
    """Bytes per token of activations and their scales."""
    sizes = read_index(store.files, store.manifest).bytes
    of_acts = sum(size for path, size in sizes.items() if path.startswith(("resid/", "scales/")))
    return of_acts / (store.manifest.windows * store.manifest.context)


def bench_quality(folder: Path, given: Path | None, tokens: str, seeds: int, pairs: Sequence[str]) -> list[Row]:
    settings = dict(pair.split("=", 1) for pair in pairs)
    paths = {kind: folder / kind for kind in (EXACT, *KINDS)} | ({EXACT: given.resolve()} if given else {})
    pocket = {"model": "pocket", "layer": 19, "attention_layers": "none", "tokens": tokens, "device": "cpu"}
    exact = Store(paths[EXACT]) if given else harvest(**pocket, out=paths[EXACT])
    assert (exact.manifest.model.dtype, exact.manifest.stored_as) == (EXACT, None), f"expected {EXACT} residuals"
    settings = {"layer": exact.manifest.layers[0]} | settings
    runs = {}
    for kind in (EXACT, *KINDS):
        if kind != EXACT:
            write_small(exact, paths[kind], kind)
        grid = {"seed": list(range(seeds))}
        with chdir(folder):  # runs go to ./runs
            trained = train(cache=paths[kind], variant="topk", grid=grid, device="cpu", plots=False, **settings)
            runs[kind] = trained.path.resolve()
    first, last = exact.manifest.splits["train"]
    train_tokens = (last - first) * exact.manifest.context
    about = f"{exact.manifest.model.id} after layer {exact.manifest.layers[0]}, {train_tokens:,} tokens in the train"
    about += f" split; topk, {', '.join(pairs)}, {seeds} {'seed' if seeds == 1 else 'seeds'}"
    context = Context(exact, watch=Watch(is_quiet=True))
    found = {kind: measure(context, run) for kind, run in runs.items()}
    rows = []
    for kind, saes in found.items():
        with Store(paths[kind]) as store:
            size = f"{bytes_per_token(store):,.1f} bytes a token"
        means = [f"{name} {mean_and_range([sae[name] for sae in saes])}" for name in METRICS]
        against = []
        for name in METRICS if kind != EXACT else ():
            differences = [a[name] - b[name] for a, b in zip(saes, found[EXACT], strict=True)]
            against.append(f"{name} {mean_and_range(differences, '+')}")
        rounds = {name: tuple(sae[name] for sae in saes) for name in METRICS}
        rows.append(Row(kind, "; ".join([size, *means]), "; ".join(against), rounds=rounds, facts={"about": about}))
    return rows


def bench_reading(folder: Path, shards: int, rounds: int) -> list[Row]:
    """Read synthetic activations of Gemma-2-2B's width from the page cache, as stored and as float32 batches. Seconds
    are processor time, which other work on the machine does not change."""
    keep_large_blocks()
    shard_WTD = from_float32(stores.make_residuals(np.random.default_rng(0)), EXACT)
    norm = float(np.linalg.norm((shard_WTD[0, 0].astype(np.uint32) << 16).view(np.float32)))
    opened = {}
    for kind in (EXACT, *KINDS):
        manifest = stores.make_manifest(shards, stored_as=None if kind == EXACT else kind)
        stores.write_store(folder / f"read_{kind}", manifest, shard_WTD, norm)
        opened[kind] = Store(folder / f"read_{kind}")
    jobs = {kind: lambda store=store: seconds_of_stream(store) for kind, store in opened.items()}
    jobs |= {f"batches {kind}": lambda store=store: seconds_of_batches(store) for kind, store in opened.items()}
    take_turns(1, jobs)  # warm-up
    speeds = speeds_of(1e-6, take_turns(rounds, jobs))
    rows = []
    for kind in reversed(KINDS):
        target = FASTER if kind == "int8" else None
        rows.append(compare(f"read {kind}", speeds[kind], speeds[EXACT], "M tokens/s", target, EXACT))
    for kind in reversed(KINDS):
        ours, theirs = (speeds[f"batches {name}"] for name in (kind, EXACT))
        rows.append(compare(f"batches of {kind} on the processor", ours, theirs, "M tokens/s", None, EXACT))
    return rows


def seconds_of_stream(store: Store) -> float:
    """Processor seconds per token, over three passes."""
    start = process_time()
    stream = store.stream(stores.RESID, store.spans(stores.RESID) * 3)
    tokens = sum(part.span.windows for part in stream) * stores.CONTEXT
    return (process_time() - start) / tokens


def seconds_of_batches(store: Store) -> float:
    """Processor seconds per token for one pass of batches, read and converted to float32."""
    plan = Plan(measure_split(store, "train"), batch_tokens=4096, pool_tokens=2**17, seed=0)
    stats: dict[Place, Stats] = {stores.LAYER: layer_stats(store, stores.LAYER, None)}
    batches = Batches(store, plan, stores.LAYER, stats, torch.device("cpu"))
    start = process_time()
    tokens = sum(len(x) for x in batches)
    return (process_time() - start) / tokens


@click.command()
@click.option(
    "--store", "given", type=click.Path(exists=True, path_type=Path), help="A bfloat16 store, instead of a new one."
)
@click.option("--tokens", default="300k", show_default=True, help="Tokens of the pocket model, without --store.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--set", "pairs", multiple=True, help="For sae-train.", default=("width=1024", "k=32", "epochs=3"))
@click.option("--shards", default=3, show_default=True, help="Shards to read, of 151 MB in bfloat16 each.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--only", type=click.Choice(["quality", "reading"]))
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    given: Path | None,
    tokens: str,
    seeds: int,
    pairs: tuple[str, ...],
    shards: int,
    rounds: int,
    only: str | None,
    json_file: Path | None,
) -> None:
    folder, rows = Path(tempfile.mkdtemp(prefix="smaller-stores-")), []
    try:
        if only != "reading":
            rows += bench_quality(folder, given, tokens, seeds, pairs)
        if only != "quality":
            rows += bench_reading(folder, shards, rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raise SystemExit(conclude("Smaller stores", rows, json_file, gather_facts()))


if __name__ == "__main__":
    main()
