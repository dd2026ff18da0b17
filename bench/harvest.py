"""The harvest against the bare forward pass and SAELens' CacheActivationsRunner, and its peak memory.

All use one random Gemma-2 of 26 layers and width 576, the residual after layer 19, the same tokens and batch size. Only
ours also captures, sparsifies and stores the attention of four layers. Jobs take turns within a round, so every ratio
comes from a single run; loading a model is never timed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import numpy as np
import torch
from stepping import wait_for
from timing_and_tables import (
    ROUNDS,
    Row,
    compare,
    conclude,
    gather_facts,
    peak_growth,
    resident,
    speeds_of,
    take_turns,
)
from tokenizers import Tokenizer, models
from transformers import AutoModel, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from worker_pipe import Worker

from saemill.cache_schema import AttentionSpec, CorpusSpec, Manifest, ModelSpec, ShardContent, Store, StoreWriter
from saemill.cache_schema.keep_freed_memory import SMALLER_THAN_SHARDS, keep_large_blocks
from saemill.harvest.capture import run
from saemill.harvest.model.load_and_truncate import Wanted, load_model
from saemill.harvest.shards import Harvester, compute_shard, harvest_shards

LAYER, ATTENTION = 19, (17, 18, 19, 20)
WIDTH, CONTEXT, VOCABULARY, BOS = 576, 128, 32_000, 2
BATCH = 16
SHARD_WINDOWS = 32
PEERS = Path(__file__).with_name("peers")
MEASURE = "--measure-memory"  # with which this file calls itself


@dataclass(frozen=True)
class Bench:
    """The inputs of every measurement."""

    folder: Path
    model: Path
    tokens: np.ndarray  # uint32 [windows, context]
    device: torch.device
    rounds: int


def make_model(folder: Path) -> Path:
    """gemma-2-2b's shape at a quarter of its width, with random weights and an unused tokenizer."""
    torch.manual_seed(0)
    Gemma2ForCausalLM(gemma(VOCABULARY, WIDTH)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def gemma(vocabulary: int, width: int, layers: int = 26, head: int = 64, mlp: int | None = None) -> Gemma2Config:
    """gemma-2-2b except for these sizes."""
    return Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp or 4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=head,
        query_pre_attn_scalar=head,
    )


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer, which SAELens requires although the tokens are given."""
    words = {"<pad>": 0, "<eos>": 1, "<bos>": BOS, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def make_tokens(windows: int) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(4, VOCABULARY, (windows, CONTEXT), dtype=np.uint32)
    tokens[:, 0] = BOS
    return tokens


def make_manifest(tokens_WT: np.ndarray, dtype: str, attention: tuple[int, ...] = ATTENTION) -> Manifest:
    windows, context = tokens_WT.shape
    return Manifest(
        model=ModelSpec("random", WIDTH, dtype=dtype, bos_token=BOS, special_tokens=(0, 1, BOS)),  # pyright: ignore
        corpus=CorpusSpec("random", settings={"batch_windows": BATCH}),
        context=context,
        layers=(LAYER,),
        windows=windows,
        splits={"train": (0, windows), "validation": (windows, windows), "test": (windows, windows)},
        attention=AttentionSpec(layers=attention),
        shard_windows=SHARD_WINDOWS,
    )


def harvest_once(out: Path, harvester: Harvester, tokens_WT: np.ndarray) -> float:
    """Seconds from tokens to committed shards; the store is removed."""
    with StoreWriter.create(out, harvester.manifest, tokens_WT, np.zeros_like(tokens_WT)) as writer:
        start = perf_counter()
        harvest_shards(writer, replace(harvester, manifest=writer.manifest), writer.pending(), lambda _: None)
        seconds = perf_counter() - start
    shutil.rmtree(out)
    return seconds


class Ours:
    """A whole harvest from tokens to committed shards."""

    def __init__(self, bench: Bench, dtype: str) -> None:
        keep_large_blocks(SMALLER_THAN_SHARDS)  # as in every harvest; the bare pass gets the same
        self.bench = bench
        model = load_model(bench.model, Wanted((LAYER,), ATTENTION), getattr(torch, dtype), bench.device)
        self.harvester = Harvester(model, make_manifest(bench.tokens, dtype), bench.device)

    def run(self, tokens: np.ndarray) -> float:
        """Seconds for these windows."""
        manifest = make_manifest(tokens, self.harvester.manifest.model.dtype)
        return harvest_once(self.bench.folder / "store", replace(self.harvester, manifest=manifest), tokens)


class Bare:
    """transformers' own eager forward pass through layer 19, keeping nothing."""

    def __init__(self, model: Path, dtype: str, device: torch.device, batch: int = BATCH) -> None:
        self.device, self.batch = device, batch
        config = Gemma2Config.from_pretrained(model)
        config.num_hidden_layers, config.layer_types = LAYER + 1, config.layer_types[: LAYER + 1]
        logging.set_verbosity_error()
        loaded = AutoModel.from_pretrained(
            model, config=config, dtype=getattr(torch, dtype), attn_implementation="eager"
        )
        loaded.norm = torch.nn.Identity()
        self.model = loaded.eval().to(device)

    @torch.inference_mode()
    def run(self, tokens: np.ndarray) -> float:
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
        start = perf_counter()
        for at in range(0, len(ids), self.batch):
            self.model(input_ids=ids[at : at + self.batch], use_cache=False)
        wait_for(self.device)
        return perf_counter() - start


class SaeLens:
    """SAELens' runner in the peers' environment. On a CPU, where processes vary in speed, each run gets a new one."""

    def __init__(
        self, folder: Path, model: Path, dtype: str, device: torch.device, python: Path, width: int, batch: int
    ) -> None:
        self.folder, self.python, self.keeps_process = folder, python, device.type == "cuda"
        self.request = {"model": str(model), "rows": str(folder / "rows.npy"), "out": str(folder / "peer")}
        self.request |= {"layer": LAYER, "width": width, "batch": batch, "dtype": dtype, "device": str(device)}
        self._worker: Worker | None = None

    def run(self, tokens_WT: np.ndarray) -> float:
        """Seconds for these windows, after a warm-up."""
        if self._worker is None:
            self._worker = Worker("SAELens", [self.python, PEERS / "sae_lens_harvest.py"])
            self._seconds(self._worker, tokens_WT[: self.request["batch"]])
        seconds = self._seconds(self._worker, tokens_WT)
        if not self.keeps_process:
            self.close()
        return seconds

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None

    def _seconds(self, worker: Worker, tokens_WT: np.ndarray) -> float:
        np.save(self.folder / "rows.npy", tokens_WT)
        return worker.ask(**self.request)["seconds"]


def bench_speed(bench: Bench, environment: Path | None) -> list[Row]:
    jobs: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        jobs |= {f"ours {dtype}": Ours(bench, dtype), f"bare {dtype}": Bare(bench.model, dtype, bench.device)}
    for job in jobs.values():
        job.run(bench.tokens[:BATCH])  # warm-up
    if environment is not None:  # warms up by itself, in each new process
        python = environment / "bin/python"
        jobs["SAELens float32"] = SaeLens(bench.folder, bench.model, "float32", bench.device, python, WIDTH, BATCH)
    seconds = take_turns(bench.rounds, {name: (lambda job=job: job.run(bench.tokens)) for name, job in jobs.items()})
    speeds = speeds_of(bench.tokens.size, seconds)
    rows = [
        compare(f"whole harvest, {dtype}", speeds[f"ours {dtype}"], speeds[f"bare {dtype}"], "tok/s", 0.9, "bare pass")
        for dtype in ("float32", "bfloat16")
    ]
    if environment is not None:
        peer = speeds["SAELens float32"]
        rows.append(compare("both in float32", speeds["ours float32"], peer, "tok/s", 1.15, "SAELens"))
        rows.append(compare("both at their defaults", speeds["ours bfloat16"], peer, "tok/s", 2.5, "SAELens"))
    return rows


def bench_memory(bench: Bench) -> list[Row]:
    """Peak memory growth of a new process since before the model was loaded: at most the model and two shards.

    Measured at a low layer: memory does not depend on how many layers lie below.
    """
    rows = []
    for layers in ((), (0, 1, 2, 3)):
        command = [sys.executable, __file__, MEASURE, bench.model, bench.folder, json.dumps(layers)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        growth, model, shard, batch = map(int, output.split()[-4:])
        found = f"{growth / 1e6:,.0f} MB"
        against = f"model {model / 1e6:,.0f} MB, two shards {2 * shard / 1e6:,.0f} MB, a batch {batch / 1e6:,.0f} MB"
        ratio = (model + 2 * shard + batch) / growth
        rows.append(Row(f"peak memory with attention of {len(layers)} layers", found, against, ratio, 0.9))
    return rows


def measure_memory(model: Path, folder: Path, layers: tuple[int, ...]) -> None:
    """Runs in a new process: print the growth, and the bytes of the model, a waiting shard and a forward pass."""
    tokens_WT = make_tokens(3 * 512)
    keep_large_blocks(SMALLER_THAN_SHARDS)
    wanted, device = Wanted((2,), layers), torch.device("cpu")
    manifest = replace(make_manifest(tokens_WT, "bfloat16", layers), layers=(2,), shard_windows=512)
    before = resident("RssAnon")
    loaded = load_model(model, wanted, torch.bfloat16, device)
    weights = sum(parameter.nbytes for parameter in loaded.stack.parameters())
    batch = peak_growth(lambda: run(loaded, torch.from_numpy(tokens_WT[:BATCH].astype(np.int64)), {}))
    out = folder / "memory"
    with StoreWriter.create(out, manifest, tokens_WT, np.zeros_like(tokens_WT)) as writer:
        harvester = Harvester(loaded, writer.manifest, device)
        start = resident("RssAnon")
        growth = peak_growth(lambda: harvest_shards(writer, harvester, writer.pending(), lambda record: None))
        with Store(writer.files) as store:
            shard = num_bytes(compute_shard(harvester, *store.beginning(0)))
    shutil.rmtree(out)
    print(start - before + growth, weights, shard, batch)


def num_bytes(content: ShardContent) -> int:
    """Bytes of a shard's arrays while it waits to be written."""
    attention = [getattr(csr, field.name) for csr in content.attention.values() for field in fields(csr)]
    return sum(array.nbytes for array in (*content.acts.values(), *attention))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--peers", type=click.Path(path_type=Path), help="Environment with SAELens.  [default: no comparison]")
@click.option("--windows", default=64, show_default=True, help="Windows of 128 tokens per timed run.")
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to create the temporary folder.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the results here.")
def main(
    peers: Path | None, windows: int, rounds: int, device: str, folder: Path | None, json_file: Path | None
) -> None:
    """Measure the harvest; the exit status is 1 if a target is missed."""
    if windows % BATCH:
        raise click.UsageError(f"--windows: expected a multiple of {BATCH}, SAELens' batch size, found {windows}")
    if peers is not None and not (peers / "bin/python").exists():
        raise click.UsageError(f"no environment at {peers}: create it with `make peers`, or leave out --peers")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        model = make_model(Path(place) / "model")
        bench = Bench(Path(place), model, make_tokens(windows), torch.device(device), rounds)
        rows = bench_speed(bench, peers)
        if device == "cpu":
            rows += bench_memory(bench)
    title = f"Harvest, random Gemma-2 of width {WIDTH}, context {CONTEXT}, {windows * CONTEXT:,} tokens"
    title += f", {rounds} rounds in turns, {torch.get_num_threads()} threads"
    facts = gather_facts(peers and peers / "bin/python", device=device, threads=torch.get_num_threads())
    sys.exit(conclude(title, rows, json_file, facts))


if __name__ == "__main__":
    if MEASURE in sys.argv:
        measure_memory(Path(sys.argv[2]), Path(sys.argv[3]), tuple(json.loads(sys.argv[4])))
    else:
        main()
