"""The harvest on an accelerator: gemma-2-2b's real shape with random weights, at short and long context.

Tokens a second of the whole harvest (residual, four layers of attention, sparsified, written, checksummed),
its share of the device's own rate in bfloat16 matrix products, and the ratio to SAELens where it is at hand.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import click
import numpy as np
import torch
from ratios import Row, conclude
from transformers import Gemma2Config, Gemma2ForCausalLM

from harvest import ATTENTION, BOS, LAYER, SaeLens, save_tokenizer
from saemill.cache_schema import AttentionSpec, CorpusSpec, Manifest, ModelSpec, StoreWriter
from saemill.harvest.capture import run
from saemill.harvest.model.load import TruncatedModel, Wanted, load_model
from saemill.harvest.shards import Harvester, harvest_shards

BATCH_TOKENS = 8192
MATRIX = 8192


@dataclass(frozen=True)
class Shape:
    """Of the model."""

    width: int = 2304
    mlp: int = 9216
    head: int = 256
    vocabulary: int = 256_000

    def config(self) -> Gemma2Config:
        return Gemma2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=self.head,
            query_pre_attn_scalar=self.head,
        )

    def flops_per_token(self, context: int) -> int:
        """Of layers 0 to 19: two for each weight, and the scores and their products with values."""
        weights = self.width * self.head * (2 * 8 + 2 * 4) + 3 * self.width * self.mlp
        return (LAYER + 1) * (2 * weights + 4 * context * 8 * self.head)


SMALL = Shape(64, 128, 16, 1000)


def make_model(folder: Path, shape: Shape, device: torch.device) -> Path:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        Gemma2ForCausalLM(shape.config()).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    save_tokenizer(folder)
    return folder


def matrix_rate(device: torch.device, size: int) -> float:
    """FLOP a second of one large product in bfloat16, the best of several."""
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * size**3 / best_seconds(device, lambda: left @ right)


def best_seconds(device: torch.device, job: Callable[[], object]) -> float:
    """Of ten times, each waited for."""
    seconds = []
    for _ in range(10):
        wait_for(device)
        start = perf_counter()
        job()
        wait_for(device)
        seconds.append(perf_counter() - start)
    return min(seconds)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_harvest(model: TruncatedModel, tokens_WT: np.ndarray, shape: Shape, folder: Path, shard_windows: int) -> float:
    windows, context = tokens_WT.shape
    device = next(model.stack.parameters()).device
    manifest = Manifest(
        model=ModelSpec("random", shape.width, bos_token=BOS, special_tokens=(0, 1, BOS)),
        corpus=CorpusSpec("random", settings={"batch_windows": max(1, BATCH_TOKENS // context)}),
        context=context,
        layers=(LAYER,),
        windows=windows,
        splits={"train": (0, windows), "validation": (windows, windows), "test": (windows, windows)},
        attention=AttentionSpec(layers=ATTENTION),
        shard_windows=shard_windows,
    )
    with StoreWriter.create(folder, manifest, tokens_WT, np.zeros_like(tokens_WT)) as writer:
        start = perf_counter()
        harvest_shards(writer, Harvester(model, writer.manifest, device), writer.pending(), lambda _: None)
        seconds = perf_counter() - start
    shutil.rmtree(folder)
    return seconds


def time_bare(model: TruncatedModel, tokens_WT: np.ndarray) -> float:
    """The same truncated pass with nothing captured, and nothing brought to the host."""
    device = next(model.stack.parameters()).device
    ids, batch = torch.from_numpy(tokens_WT.astype(np.int64)).to(device), max(1, BATCH_TOKENS // tokens_WT.shape[1])
    wait_for(device)
    start = perf_counter()
    for at in range(0, len(ids), batch):
        run(model, ids[at : at + batch], {})
    wait_for(device)
    return perf_counter() - start


def bench_context(
    context: int, tokens: int, rounds: int, folder: Path, device: torch.device, shape: Shape, peers: Path | None
) -> list[Row]:
    """All jobs at one context, in turns."""
    generator = np.random.default_rng(0)
    tokens_WT = generator.integers(4, shape.vocabulary, (tokens // context, context), dtype=np.uint32)
    tokens_WT[:, 0] = BOS
    model = load_model(folder / "model", Wanted((LAYER,), ATTENTION), torch.bfloat16, device)
    shard_windows = max(1, 32768 // context)
    jobs = {
        "ours": lambda: time_harvest(model, tokens_WT, shape, folder / "store", shard_windows),
        "bare": lambda: time_bare(model, tokens_WT),
    }
    for job in jobs.values():
        job()  # to warm
    if peers is not None:  # which warms each of its processes
        batch = max(1, BATCH_TOKENS // context)
        peer = SaeLens(folder, folder / "model", "bfloat16", device, peers, shape.width, batch)
        jobs["SAELens"] = lambda: peer.run(tokens_WT)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            seconds[name].append(job())
    rates = {name: tokens_WT.size / statistics.median(values) for name, values in seconds.items()}
    return rows_of(context, rates, shape, matrix_rate(device, MATRIX if device.type == "cuda" else 512))


def rows_of(context: int, rates: dict[str, float], shape: Shape, rate: float) -> list[Row]:
    ours, flops = rates["ours"], shape.flops_per_token(context)
    found = f"{ours:,.0f} tok/s"
    share = ours * flops / rate
    rows = [
        Row(f"context {context}: harvest", found, f"bare pass {rates['bare']:,.0f} tok/s", ours / rates["bare"], 0.9),
        Row(
            f"context {context}: of the matrix rate",
            f"{ours * flops / 1e12:,.1f} TFLOP/s",
            f"{rate / 1e12:,.1f}",
            share,
        ),
    ]
    if "SAELens" in rates:
        against = f"SAELens {rates['SAELens']:,.0f} tok/s"
        rows.append(Row(f"context {context}: same dtype", found, against, ours / rates["SAELens"], 1.15))
    return rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--peers", type=click.Path(path_type=Path), help="The environment that has SAELens; none: not compared.")
@click.option("--tokens", default=262_144, show_default=True, help="In a timed run.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--small", is_flag=True, help="A tiny model: to try this script, not to measure.")
@click.option("--folder", type=click.Path(path_type=Path), help="On which disk; a temporary folder by default.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Keep the table here.")
def main(
    peers: Path | None, tokens: int, rounds: int, device: str, small: bool, folder: Path | None, json_file: Path | None
) -> None:
    """Measure the harvest on an accelerator; the exit status is 1 where a target is missed."""
    shape, where = SMALL if small else Shape(), torch.device(device)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        make_model(Path(place) / "model", shape, where)
        for context in (128, 1024):
            rows += bench_context(context, tokens, rounds, Path(place), where, shape, peers)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else device
    print(json.dumps({"torch": torch.__version__, "device": name}))
    sys.exit(conclude(f"Harvest on {name}, width {shape.width}, bfloat16, {rounds} rounds in turns", rows, json_file))


if __name__ == "__main__":
    main()
