"""What guidance by attention costs: a hierarchical step against its base's step on the same windows.

Both train in this process, in turns, on Gaussian rows with random sparse attention of four layers. Ratios are of
speeds: 0.74 means that a step takes 1.35 times as long. Memory is the largest sum of live tensors in a step.

    python bench/guided.py [--d-model 2304 --width 2304 --windows 16 --context 128]
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, get_args

import click
import torch
from stepping import sparse_bias, wait_for
from timing_and_tables import ROUNDS, Row, compare, conclude, gather_facts, speeds_of, take_turns
from torch.profiler import ProfilerActivity, profile

from saemill.cache_schema.keep_freed_memory import keep_large_blocks
from saemill.train.data.batch import AttentionRows, Batch
from saemill.train.engine.step import Trainee
from saemill.train.kit.variant_registry import config_type
from saemill.train.kit.wrapping import build_base
from saemill.train.sae.kernels.dense_products import Product

LAYERS = (17, 18, 19, 20)
KEYS = 16  # per row of attention, as in a harvest
ALLOWED = 1.35  # times the base's time
TOTAL_STEPS = 1000


def make_batch(generator: torch.Generator, windows: int, context: int, d_model: int, device: torch.device) -> Batch:
    """Whole windows, each without its special first token; on a GPU with as many entries of attention in each layer, as
    in a run."""
    rows = windows * (context - 1)
    window, place = torch.arange(rows) // (context - 1), torch.arange(rows) % (context - 1) + 1
    row_of = torch.full((windows, context), -1)
    row_of[window, place] = torch.arange(rows)
    attention = {layer: make_attention(generator, windows, context) for layer in LAYERS}
    if device.type == "cuda":
        attention = {layer: rows.padded(windows * context * KEYS) for layer, rows in attention.items()}
    side = {"window": window, "position": place, "row_of": row_of, "attention": attention}
    return Batch(torch.randn(rows, d_model, generator=generator), side=side).map(lambda tensor: tensor.to(device))


def make_attention(generator: torch.Generator, windows: int, context: int) -> AttentionRows:
    """The largest KEYS of random causal probabilities, heads averaged."""
    causal = torch.ones(context, context).tril().bool()
    scores = 2 * torch.randn(windows, 1, context, context, generator=generator)
    probs = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    kept = (probs >= probs.topk(min(KEYS, context), dim=-1).values[..., -1:]) & (probs > 0)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(-1).flatten().cumsum(0)])
    return AttentionRows(indptr, kept.nonzero()[:, 3], probs[kept], (probs * kept).sum(-1))


def make_pair(base: str, batch: Batch, width: int, sparsity: int, product: str) -> dict[str, Trainee]:
    """The base, and the same with guidance; both start with `sparsity` latents firing."""
    cls = config_type("hierarchical")
    config = cls(base=base, width=width, k=sparsity if base == "topk" else None, encoder_product=product)
    d_model = batch.x.shape[1]
    pair = {}
    for name, assembly in (("base", build_base(config, d_model)), ("hierarchical", config.build(d_model))):
        trainee = Trainee(name, assembly, TOTAL_STEPS, device=batch.x.device)
        trainee.step_index = TOTAL_STEPS // 2  # past every warm-up
        if base != "topk":
            with torch.no_grad():
                sae = trainee.sae
                sae.b_enc.fill_(-sparse_bias(sae.centred(batch.x) @ sae.W_enc.t(), sparsity))
        pair[name] = trainee
    return pair


def peak_bytes(trainee: Trainee, batch: Batch) -> int:
    """The peak memory of the tensors that a step allocates."""
    if batch.x.is_cuda:
        torch.cuda.synchronize()
        trainee.replays.is_possible = False  # replayed steps allocate nothing
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainee.step(batch)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainee.step(batch)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(live.cumsum(0).max())


def steps(trainee: Trainee, batch: Batch, count: int) -> None:
    for _ in range(count):
        trainee.step(batch)
    wait_for(batch.x.device)


def measure(base: str, settings: dict[str, Any]) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    shape = (settings["windows"], settings["context"], settings["d_model"])
    batch = make_batch(generator, *shape, torch.device(settings["device"]))
    pair = make_pair(base, batch, settings["width"], settings["sparsity"], settings["product"])
    batches = {"base": Batch(batch.x), "hierarchical": batch}
    for who, trainee in pair.items():
        steps(trainee, batches[who], 4 if batch.x.is_cuda else 1)
    rows, count = batch.x.shape[0], settings["steps"]
    name = f"{base}, {settings['sparsity']} active, {settings['product']}"
    jobs = {who: (lambda who=who: steps(pair[who], batches[who], count)) for who in pair}
    speeds = speeds_of(rows * count, take_turns(settings["rounds"], jobs))
    if batch.x.is_cuda:
        click.echo(f"{name}: steps replayed: " + ", ".join(f"{who} {one.replays.served}" for who, one in pair.items()))
    speed = compare(f"{name}: step", speeds["hierarchical"], speeds["base"], "tok/s", 1 / ALLOWED, "base")
    peaks = {who: peak_bytes(trainee, batches[who]) for who, trainee in pair.items()}
    growth, room = peaks["hierarchical"] - peaks["base"], batch.x.numel() * 4
    against = f"a batch of activations: {room / 2**20:.1f} MiB"
    memory = Row(f"{name}: memory", f"{growth / 2**20:+.1f} MiB", against, room / max(growth, 1), 1.0)
    longer = speeds["base"].median / speeds["hierarchical"].median
    return [dataclasses.replace(speed, against=f"{speed.against}; {longer:.2f} times as long"), memory]


@click.command()
@click.option("--base", "bases", multiple=True, default=("standard", "topk"), show_default=True)
@click.option("--d-model", default=2304, show_default=True)
@click.option("--width", default=2304, show_default=True)
@click.option("--windows", default=16, show_default=True)
@click.option("--context", default=128, show_default=True)
@click.option("--sparsity", default=32, show_default=True, help="Active latents per token.")
@click.option("--product", type=click.Choice(get_args(Product)), default="float32", show_default=True)
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option("--steps", default=1, show_default=True, help="Steps per round.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the results here.")
def main(bases: tuple[str, ...], json_file: Path | None, **settings: Any) -> None:
    """Measure a hierarchical step against its base's."""
    torch.set_num_threads(settings["threads"])
    keep_large_blocks()
    rows = [row for base in bases for row in measure(base, settings)]
    shape = "D {d_model}, width {width}, {windows} windows of {context}, {threads} threads".format(**settings)
    facts = gather_facts(device=settings["device"], threads=settings["threads"])
    title = f"guidance by attention: {shape}"
    raise SystemExit(conclude(title, rows, json_file, facts))


if __name__ == "__main__":
    main()
