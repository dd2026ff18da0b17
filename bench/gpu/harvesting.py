"""The harvest of a model of gemma-2-2b's real shape with random weights, at short and at long context.

Ours is a whole harvest (one residual, four layers of attention, sparsified, written, checksummed). It is compared with
our own truncated pass with nothing captured, with that pass without our kernels, with
transformers' eager pass through the same layers, and with SAELens' runner caching the one residual. All are eager,
because only that is Gemma-2 with its softcap. If the disk is slow, everything is written to memory (/dev/shm), which
the log states. At the short context our shards are also computed without being written. Nothing overlaps the writing of
the last of eight shards; a real harvest has thousands.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from records import record, record_failure, shares, tell
from stepping import wait_for
from timing_and_tables import take_turns
from transformers import Gemma2ForCausalLM
from worker_pipe import WorkerFailed

from harvest import ATTENTION, BOS, LAYER, Bare, SaeLens, gemma, harvest_once, make_manifest, save_tokenizer
from saemill.harvest.capture import run
from saemill.harvest.model import fused_on_gpu
from saemill.harvest.model.load_and_truncate import TruncatedModel, Wanted, load_model
from saemill.harvest.shards import Harvester, compute_shard

ENOUGH = 24 * 10**9  # bytes that must be free in the folder written to
SLOW_DISK = 2e9  # bytes per second with fsync
SHARD = 4  # batches


@dataclass(frozen=True)
class Shape:
    """The shape of the model."""

    width: int = 2304
    mlp: int = 9216
    head: int = 256
    vocabulary: int = 256_000
    contexts: tuple[int, int] = (128, 1024)
    batch_tokens: int = 8192
    """Of every contestant; SAELens needs the number of tokens to be a multiple of it."""

    def flops_per_token(self, context: int) -> int:
        """For layers 0 to 19: two per weight, plus attention scores and their products with the values."""
        weights = self.width * self.head * (2 * 8 + 2 * 4) + 3 * self.width * self.mlp
        return (LAYER + 1) * (2 * weights + 4 * context * 8 * self.head)


SMALL = Shape(64, 128, 16, 1000, (16, 32), 256)


def make_model(folder: Path, shape: Shape, device: torch.device) -> Path:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        Gemma2ForCausalLM(gemma(shape.vocabulary, shape.width, head=shape.head, mlp=shape.mlp)).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    save_tokenizer(folder)
    return folder


def make_harvester(model: TruncatedModel, tokens_WT: np.ndarray, shape: Shape) -> Harvester:
    """A harvester with shards of SHARD batches."""
    manifest, batch = make_manifest(tokens_WT, "bfloat16"), shape.batch_tokens // tokens_WT.shape[1]
    manifest = replace(
        manifest,
        model=replace(manifest.model, d_model=shape.width),
        corpus=replace(manifest.corpus, settings={"batch_windows": batch}),
        shard_windows=SHARD * batch,
    )
    return Harvester(model, manifest, next(model.stack.parameters()).device)


def compute_once(model: TruncatedModel, tokens_WT: np.ndarray, shape: Shape) -> float:
    """A whole harvest except for writing."""
    harvester = make_harvester(model, tokens_WT, shape)
    start = time.perf_counter()
    for shard in range(harvester.manifest.shards):
        tokens = tokens_WT[slice(*harvester.manifest.shard_range(shard))]
        compute_shard(harvester, tokens, tokens)
    return time.perf_counter() - start


def pass_once(model: TruncatedModel, tokens_WT: np.ndarray, batch: int) -> float:
    """Our truncated pass, with nothing captured and nothing copied to the host."""
    device = next(model.stack.parameters()).device
    ids = torch.from_numpy(tokens_WT.astype(np.int64)).to(device)
    wait_for(device)
    start = time.perf_counter()
    for at in range(0, len(ids), batch):
        run(model, ids[at : at + batch], {})
    wait_for(device)
    return time.perf_counter() - start


def pass_plainly(model: TruncatedModel, tokens_WT: np.ndarray, batch: int) -> float:
    with own_operations():
        return pass_once(model, tokens_WT, batch)


@contextmanager
def own_operations() -> Iterator[None]:
    """Let models compute everything by their own operations, as if there were no kernels of ours."""
    served, fused_on_gpu.SERVED = fused_on_gpu.SERVED, set[str]()
    try:
        yield
    finally:
        fused_on_gpu.SERVED = served


def bench_context(context: int, tokens: int, rounds: int, folder: Path, device: torch.device, shape: Shape) -> None:
    """Time ours and transformers in turns."""
    tokens_WT, model = make_tokens(context, tokens, shape), load_ours(folder, device)
    with own_operations():
        plain = load_ours(folder, device)
    batch = shape.batch_tokens // context
    bare = Bare(folder / "model", "bfloat16", device, batch)
    jobs = {
        "ours": partial(harvest_once, folder / "store", make_harvester(model, tokens_WT, shape), tokens_WT),
        "our pass, nothing captured": lambda: pass_once(model, tokens_WT, batch),
        "the same by the model's own operations": lambda: pass_plainly(plain, tokens_WT, batch),
        "transformers, eager": lambda: bare.run(tokens_WT),
    }
    if context == shape.contexts[0]:
        jobs["our shards, not written"] = lambda: compute_once(model, tokens_WT, shape)
    take_turns(1, jobs)
    reset_peak(device)
    start = time.time()
    seconds = take_turns(rounds, jobs)
    record_all(context, seconds, tokens_WT.size, shape, (start, time.time()), peak_of(device))


def bench_peer(
    context: int, tokens: int, rounds: int, folder: Path, device: torch.device, shape: Shape, peer: SaeLens
) -> None:
    """Time ours and SAELens in turns, in fewer rounds because its runs are long."""
    tokens_WT, model = make_tokens(context, tokens, shape), load_ours(folder, device)
    peer.request["batch"] = shape.batch_tokens // context
    jobs: dict[str, Any] = {
        "ours, beside SAELens": partial(
            harvest_once, folder / "store", make_harvester(model, tokens_WT, shape), tokens_WT
        ),
        "SAELens, one residual": lambda: peer.run(tokens_WT),
    }
    try:
        take_turns(1, jobs)
        start = time.time()
        seconds = take_turns(rounds, jobs)
        record_all(context, seconds, tokens_WT.size, shape, (start, time.time()), None)
    except WorkerFailed as failure:
        record_failure(f"harvest, context {context}", "SAELens, one residual", str(failure))


def record_all(
    context: int,
    seconds: dict[str, list[float]],
    tokens: int,
    shape: Shape,
    at: tuple[float, float],
    peak: float | None,
) -> None:
    for who, values in seconds.items():
        rates = [tokens / value for value in values]
        flops = sorted(rates)[len(rates) // 2] * shape.flops_per_token(context)
        more = shares(flops) | ({"peak_gigabytes": peak} if who == "ours" else {})
        record(f"harvest, context {context}", who, "tok/s", rates, at, **more)


def make_tokens(context: int, tokens: int, shape: Shape) -> np.ndarray:
    tokens = max(1, round(tokens / shape.batch_tokens)) * shape.batch_tokens
    found = np.random.default_rng(0).integers(4, shape.vocabulary, (tokens // context, context), dtype=np.uint32)
    found[:, 0] = BOS
    return found


def load_ours(folder: Path, device: torch.device) -> TruncatedModel:
    return load_model(folder / "model", Wanted((LAYER,), ATTENTION), torch.bfloat16, device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_of(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None


def choose_folder(folder: Path | None) -> Path:
    """The disk; or memory, if it has room and the disk is so slow that it would hide the device's speed."""
    place, memory = folder or Path(tempfile.gettempdir()), Path("/dev/shm")
    rate = disk_rate(place)
    is_moved = folder is None and rate < SLOW_DISK and memory.is_dir() and shutil.disk_usage(memory).free > ENOUGH
    chosen = "memory (/dev/shm)" if is_moved else "the disk"
    tell(f"the disk takes {rate / 1e9:.2f} GB/s with fsync: harvests are written to {chosen}")
    return memory if is_moved else place


def disk_rate(folder: Path) -> float:
    block, count = os.urandom(1 << 24), 16
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(count):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return count * len(block) / (time.perf_counter() - start)


@click.command()
@click.option("--peers-python", help="Python of the peers' environment.  [default: no comparison]")
@click.option("--tokens", default=262_144, show_default=True, help="Tokens per timed run, rounded to 8192s.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--peer-rounds", default=2, show_default=True)
@click.option("--limit", default=150.0, show_default=True, help="Seconds; nothing is started that would take longer.")
@click.option("--device", default="cuda")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to create the temporary folder.")
@click.option("--small", is_flag=True)
def main(
    peers_python: str | None,
    tokens: int,
    rounds: int,
    peer_rounds: int,
    limit: float,
    device: str,
    folder: Path | None,
    small: bool,
) -> None:
    shape, where, until = SMALL if small else Shape(), torch.device(device), time.monotonic() + limit
    with tempfile.TemporaryDirectory(dir=choose_folder(folder)) as name:
        place = Path(name)
        make_model(place / "model", shape, where)
        tell("model made")
        longest = 0.0
        for context in shape.contexts:
            start = time.monotonic()
            if start + longest > until:
                tell(f"context {context}: no time left")
                continue
            bench_context(context, tokens, rounds, place, where, shape)
            longest = time.monotonic() - start
            reset_peak(where)
        if peers_python is None:
            return
        peer = SaeLens(place, place / "model", "bfloat16", where, Path(peers_python), shape.width, 1)
        for context in shape.contexts:
            if time.monotonic() + max(30.0, longest) > until and not small:
                tell(f"SAELens at context {context}: no time left")
                continue
            bench_peer(context, tokens, peer_rounds, place, where, shape, peer)
        peer.close()


if __name__ == "__main__":
    main()
