"""The core evaluation against official SAEBench 0.6.0, and how much memory it takes at a large vocabulary.

Runs on the pocket model and on a random 26-layer Gemma-2 of width 576, on the residual after layer 19. Both sides get
the same model, tokens and SAEs, and ten batches for sparsity to each batch for the model's losses, SAEBench's own
proportion. One SAE, and eight, which the official code evaluates one after another. Cold: the clean pass and SAEBench's
own ablation are computed, as SAEBench does; warm: an earlier run has left them next to the store, with mean and
resample ablation. Every run is a new process, both sides take turns, and loading is never timed.

    python bench/evaluate.py --saebench .venv-saebench
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save_file
from timing_and_tables import ROUNDS, Row, compare, conclude, gather_facts, speeds_of, take_turns
from transformers import Gemma2ForCausalLM
from worker_pipe import Worker

from harvest import gemma
from saemill.cache_schema import CorpusSpec, Manifest, ModelSpec, ShardContent, Site, StoreWriter
from saemill.harvest.capture import capture
from saemill.harvest.model.load_and_truncate import Wanted, load_model, read_facts
from saemill.harvest.pocket import MODEL_FOLDER
from saemill.harvest.stats import measure
from saemill.train.data.scaling import unit_stats
from saemill.train.disk.sae_lens_folder import save_sae
from saemill.train.sae.gates import TopK
from saemill.train.sae.model import SparseAutoencoder, tied_weights

PEERS = Path(__file__).with_name("peers")
LAYER, CONTEXT, BATCH, K = 19, 128, 16, 32
SPECIAL, BOS = (0, 1, 2), 2
WIDTH, VOCABULARY, LARGE_VOCABULARY = 576, 32_000, 256_000
BATCHES = {"pocket": 4, "random": 1}  # for losses; the small model gets more, so that start-up does not dominate
TARGETS = {1: 8.0, 8: 12.0}
EXTRA_BYTES = 2 * 10**9


@dataclass(frozen=True)
class World:
    """A model, rows of tokens, their residuals as a store, and SAEs for them."""

    folder: Path
    model: Path
    dtype: str
    saes: tuple[Path, ...]
    reconstruction: int
    sparsity: int

    def request(self, saes: int, **more: Any) -> dict[str, Any]:
        """The request to a worker."""
        request = {
            "model": str(self.model),
            "store": str(self.folder / "store"),
            "tokens": str(self.folder / "tokens.safetensors"),
            "saes": [str(sae) for sae in self.saes[:saes]],
            "dtype": self.dtype,
            "batch": BATCH,
            "reconstruction": self.reconstruction,
            "sparsity": self.sparsity,
            "special": SPECIAL,
            "ablations": ["zero", "mean", "resample"],
        }
        return request | more

    def forget(self) -> None:
        """Remove the results that earlier runs left next to the store."""
        shutil.rmtree(self.folder / "store.evals", ignore_errors=True)


def make_random_model(folder: Path, width: int, vocabulary: int, layers: int) -> Path:
    """gemma-2-2b's shape at a quarter of its width."""
    torch.manual_seed(0)
    Gemma2ForCausalLM(gemma(vocabulary, width, layers)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_world(folder: Path, model: Path, dtype: str, saes: int, reconstruction: int, sparsity: int) -> World:
    """Random tokens; random top-k SAEs of sixteen times the width."""
    facts = read_facts(model)
    layer = min(LAYER, facts.num_layers - 2)
    windows = BATCH * (reconstruction + sparsity)
    tokens = np.random.default_rng(0).integers(4, facts.vocab_size, (windows + 2, CONTEXT), dtype=np.uint32)
    tokens[:, 0] = BOS
    write_store(folder / "store", model, layer, tokens, dtype)
    save_file({"tokens": torch.from_numpy(tokens[2:].astype(np.int64))}, folder / "tokens.safetensors")
    folders = tuple(make_sae(folder / f"sae_{number}", facts.d_model, layer, number) for number in range(saes))
    return World(folder, model, dtype, folders, reconstruction, sparsity)


def write_store(path: Path, model_folder: Path, layer: int, tokens_WT: np.ndarray, dtype: str) -> None:
    """Write a store with one window for training, one for validation and the others for testing."""
    model = load_model(model_folder, Wanted((layer,)), getattr(torch, dtype))
    windows, place = len(tokens_WT), Site("resid", layer)
    manifest = Manifest(
        model=ModelSpec("bench", model.facts.d_model, dtype=dtype, bos_token=BOS, special_tokens=SPECIAL),  # pyright: ignore
        corpus=CorpusSpec("random"),
        context=CONTEXT,
        layers=(layer,),
        windows=windows,
        splits={"train": (0, 1), "validation": (1, 2), "test": (2, windows)},
        shard_windows=BATCH,
    )
    documents = np.repeat(np.arange(windows, dtype=np.uint32), CONTEXT).reshape(windows, CONTEXT)
    with StoreWriter.create(path, manifest, tokens_WT, documents) as writer:
        for shard in writer.pending():
            rows = slice(*manifest.shard_range(shard))
            ids = torch.from_numpy(tokens_WT[rows].astype(np.int64))
            resid = capture(model, ids, manifest.attention).acts[place]
            stored = resid.view(torch.uint16).numpy() if dtype == "bfloat16" else resid.numpy()
            moments = measure(layer, resid, torch.isin(ids, torch.tensor(SPECIAL)))
            with writer.claim(shard):
                writer.write(shard, ShardContent(tokens_WT[rows], documents[rows], {place: stored}, {place: moments}))


def make_sae(folder: Path, d_model: int, layer: int, seed: int) -> Path:
    W_enc, W_dec = tied_weights(16 * d_model, d_model, torch.Generator().manual_seed(seed))
    metadata = {"model_name": "bench", "hook_name": f"blocks.{layer}.hook_resid_post", "context_size": CONTEXT}
    metadata |= {"layers": [layer], "target_layers": [layer], "prepend_bos": True}
    sae = SparseAutoencoder(W_enc, W_dec, TopK(K))
    save_sae(folder, sae, unit_stats(d_model), metadata, {}, "topk")
    return folder


def run_ours(world: World, saes: int, **more: Any) -> dict[str, Any]:
    return ask_once("ours", [sys.executable, PEERS / "ours_core.py"], world.request(saes, **more))


def run_official(world: World, saes: int, environment: Path) -> float:
    """The seconds for several SAEs: the sum over each of them."""
    command = [environment / "bin/python", "-W", "ignore", PEERS / "saebench_core.py"]
    return sum(ask_once("SAEBench", command, world.request(saes))["seconds"])


def ask_once(name: str, command: list[Any], request: dict[str, Any]) -> dict[str, Any]:
    """Use a new process for each request, so that nothing is warm and its memory is its own."""
    with closing(Worker(name, command)) as worker:
        return worker.ask(**request)


def run_cold(world: World, saes: int) -> float:
    world.forget()
    return run_ours(world, saes, ablations=["zero"])["seconds"]


def run_warm(world: World, saes: int) -> float:
    """Seconds when an earlier run has left its results next to the store."""
    world.forget()
    run_ours(world, saes)
    return run_ours(world, saes)["seconds"]


def bench_speed(name: str, world: World, environment: Path, rounds: int, counts: tuple[int, ...]) -> list[Row]:
    rows = []
    for count in counts:
        jobs = {
            "cold": lambda count=count: run_cold(world, count),
            "warm": lambda count=count: run_warm(world, count),
            "official": lambda count=count: run_official(world, count, environment),
        }
        tokens = BATCH * CONTEXT * (world.reconstruction + world.sparsity) * count
        speeds = speeds_of(tokens, take_turns(rounds, jobs))
        what = f"{name}, {world.dtype}, {count} SAE{'s' if count > 1 else ''}"
        rows += [
            compare(f"{what}, {state}", speeds[state], speeds["official"], "tok/s", TARGETS.get(count), "SAEBench")
            for state in ("cold", "warm")
        ]
    return rows


def bench_memory(world: World, counts: tuple[int, ...]) -> list[Row]:
    """Peak memory growth of a new process since before its model was loaded, SAEs included."""
    rows, vocabulary = [], read_facts(world.model).vocab_size
    for count in counts:
        world.forget()
        found = run_ours(world, count)
        growth = f"{found['growth'] / 1e9:,.2f} GB, {found['work'] / 1e9:,.2f} GB of it after loading"
        against = f"model {found['weights'] / 1e9:,.2f} GB and 2 GB"
        ratio = (found["weights"] + EXTRA_BYTES) / found["growth"]
        rows.append(Row(f"peak memory, vocabulary {vocabulary:,}, {count} SAEs", growth, against, ratio, 1.0))
    return rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--saebench", "environment", type=click.Path(path_type=Path), help="Environment with sae-bench 0.6.0.")
@click.option(
    "--model", "models", multiple=True, type=click.Choice(list(BATCHES)), default=list(BATCHES), show_default=True
)
@click.option("--dtype", "dtypes", multiple=True, default=("float32", "bfloat16"), show_default=True)
@click.option("--saes", "counts", multiple=True, type=int, default=(1, 8), show_default=True)
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option(
    "--reconstruction",
    type=int,
    help="Batches for losses; ten times as many follow for sparsity.  [default: 4 for pocket, 1 for the other]",
)
@click.option("--width", default=WIDTH, show_default=True, help="Width of the random model.")
@click.option("--layers", default=26, show_default=True, help="Layers of the random model.")
@click.option("--vocabulary", default=VOCABULARY, show_default=True, help="Its vocabulary for measuring speed.")
@click.option("--large-vocabulary", default=LARGE_VOCABULARY, show_default=True, help="And for measuring memory.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to create the temporary folder.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the results here.")
def main(
    environment: Path | None,
    models: tuple[str, ...],
    dtypes: tuple[str, ...],
    counts: tuple[int, ...],
    rounds: int,
    reconstruction: int | None,
    width: int,
    layers: int,
    vocabulary: int,
    large_vocabulary: int,
    folder: Path | None,
    json_file: Path | None,
) -> None:
    """Measure the core evaluation; the exit status is 1 if a target is missed."""
    rows: list[Row] = []
    for name in models if environment is not None else ():
        batches = reconstruction or BATCHES[name]
        title = f"{name} model, {batches} + {10 * batches} batches"
        for dtype in dtypes:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                root = Path(place)
                is_random = name == "random"
                model = make_random_model(root / "model", width, vocabulary, layers) if is_random else MODEL_FOLDER
                world = make_world(root, model, dtype, max(counts), batches, 10 * batches)
                rows += bench_speed(title, world, environment, rounds, counts)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        root = Path(place)
        model = make_random_model(root / "model", width, large_vocabulary, layers)
        rows += bench_memory(make_world(root, model, "bfloat16", max(counts), 1, 1), counts)
    title = f"Core evaluation, batches for losses + for sparsity, layer {LAYER}, {torch.get_num_threads()} threads"
    facts = gather_facts(environment and environment / "bin/python", threads=torch.get_num_threads())
    sys.exit(conclude(title, rows, json_file, facts))


if __name__ == "__main__":
    main()
