"""The GPU kernels one by one at the sizes of a real step, and where the time of whole steps goes.

D 2304, k 64, 4,096 rows. Every line is printed and recorded as soon as it is measured: the median milliseconds of
repeated launches, by device events, and the resulting bytes or operations per second.

    bash bench/gpu/run.sh --only kernels
    python bench/gpu/kernels.py [--width 16384 --width 65536] [--profile]  # if saemill is installed
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from racing import UNEQUAL
from records import record

from saemill.train.data.batch import Batch
from saemill.train.engine.step import LOOK_EVERY, Trainee
from saemill.train.kit.variant_registry import config_type
from saemill.train.sae.kernels.hardware import has_triton
from saemill.train.sae.kernels.sparse_support import support_from_topk
from saemill.train.sae.kernels.triton import exact_top_k, row_update, sparse_products

D, K, B = 2304, 64, 4096
HEAD_START = 8_000_000  # cycles, about 4 ms, in which the host queues everything that is timed


def milliseconds(job: Callable[[], object]) -> list[float]:
    """The device's own time: it sleeps until all launches are queued, so that it never waits for Python."""
    for _ in range(3):
        job()
    found = []
    for _ in range(10):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        start.record()
        job()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop))
    return found


def tell(what: str, rounds: list[float], bytes_moved: float = 0.0, operations: float = 0.0, **more: Any) -> None:
    """Record the milliseconds of repeated launches."""
    ms = statistics.median(rounds)
    rates = {"GB_per_s": bytes_moved / ms / 1e6} if bytes_moved else {}
    rates |= {"TFLOP_per_s": operations / ms / 1e9} if operations else {}
    record(what, "device", "ms", rounds, (time.time(), time.time()), **rates, **more)


def measure(width: int) -> None:
    def timed(what: str, job: Callable[[], object], bytes_moved: float = 0.0, operations: float = 0.0) -> None:
        tell(f"F {width}: {what}", milliseconds(job), bytes_moved, operations)

    x, W = torch.randn(B, D, device="cuda"), torch.nn.functional.normalize(torch.randn(width, D, device="cuda"))
    low_x, low_W = x.bfloat16(), W.bfloat16()
    timed("encoder product", lambda: low_x @ low_W.t(), operations=2 * B * D * width)
    pre = low_x @ low_W.t()
    full = pre.float()
    timed(f"top {K} of rows, bfloat16", lambda: exact_top_k.top_latents(pre, K), pre.nbytes)
    timed("the same by torch.topk", lambda: pre.topk(K, sorted=False), pre.nbytes)
    timed(f"top {K} of rows, float32", lambda: exact_top_k.top_latents(full, K), full.nbytes)
    timed(f"top {K * B} of the batch, bfloat16", lambda: exact_top_k.top_of_batch(pre, K * B), pre.nbytes)
    unequal = pre * torch.exp(UNEQUAL * torch.randn(B, 1, device="cuda")).bfloat16()
    timed(f"top {K * B} of a batch of unequal rows", lambda: exact_top_k.top_of_batch(unequal, K * B), pre.nbytes)
    latents = exact_top_k.top_latents(pre, K)
    support = support_from_topk(latents, width)
    values = torch.rand(B * K, device="cuda")
    gathered = 4.0 * B * K * D
    timed("entries by latent", lambda: support_from_topk(latents, width).by_latent)
    by_latent = support.by_latent
    for name, table in (("float32", W), ("bfloat16", low_W)):
        job = partial(sparse_products.bag_sum, table, support.latents, support.offsets, values)
        timed(f"decode from {name}", job, gathered)
    weighted = {"mode": "sum", "per_sample_weights": values, "include_last_offset": True}
    job = partial(torch.nn.functional.embedding_bag, support.latents, W, support.offsets, **weighted)
    timed("decode by embedding_bag", job, gathered)
    for name, rows in (("float32", x), ("bfloat16", low_x)):
        job = partial(sparse_products.pair_dots, W, by_latent.latents, rows, by_latent.rows, by_latent.order)
        timed(f"pair dots by latent, rows {name}", job, gathered)
    moments = torch.zeros_like(W), torch.zeros_like(W)
    low = torch.empty_like(low_W)
    lr, betas = torch.tensor(1e-5, device="cuda"), torch.tensor([0.9, 0.999], dtype=torch.float64, device="cuda")
    adam = row_update.AdamStep(lr, 1 - betas**10, 0.9, 0.999, 1e-8, 0.0)
    sorted_values = values[by_latent.order]
    moved = 6.0 * W.nbytes + low.nbytes
    for name, rows in (("float32", x), ("bfloat16", low_x)):
        entries = by_latent.offsets, by_latent.latents, by_latent.rows, sorted_values, rows
        job = partial(row_update.update_rows, W, moments, entries, adam, low=low, unit=True)
        timed(f"row update, rows {name}", job, moved + gathered / (1 if name == "float32" else 2))
    job = partial(row_update.update_rows, W, moments, None, adam, low=low, unit=True)
    timed("row update without entries", job, moved)
    centre = torch.rand(width, device="cuda")
    timed("one vector times W", lambda: centre @ W, W.nbytes)


def step(variant: str, width: int, profile: bool) -> None:
    config = config_type(variant)(width=width, k=K)
    trainee = Trainee(variant, config.build(D), total_steps=100_000, device="cuda")
    batches = [Batch(torch.randn(B, D, device="cuda")) for _ in range(3)]
    torch.cuda.reset_peak_memory_stats()  # the first two steps are launched; replayed steps allocate nothing
    for index in range(6):
        trainee.step(batches[index % 3])
    torch.cuda.synchronize()
    found = []
    for _ in range(5):  # several steps at once, as in training, where the host may run ahead
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for index in range(8):
            trainee.step(batches[index % 3])
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 8)
    peak = torch.cuda.max_memory_allocated() / 2**30
    tell(f"{variant} F {width}: a step, {B / statistics.median(found) * 1e3:,.0f} tok/s", found, peak_GiB=peak)
    time_changing_steps(trainee, batches[0].x, f"{variant} F {width}")
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            for index in range(4):
                trainee.step(batches[index % 3])
            torch.cuda.synchronize()
        events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
        for event in events[:16]:
            what = f"    {variant} F {width}: {event.key[:90]} x{event.count / 4:g}"
            tell(what, [event.self_device_time_total / 4e3])


def time_changing_steps(trainee: Trainee, x: torch.Tensor, what: str) -> None:
    """Time steps as in a run with massive rows and dying latents: batches have two sizes, and every LOOK_EVERY steps
    another latent is dead, so that no recording serves longer."""
    sizes, found = (Batch(x), Batch(x[:-1].clone())), []
    while trainee.step_index % LOOK_EVERY:
        trainee.step(sizes[0])
    served = trainee.replays.served
    for dead in range(1, 9):
        trainee.counters.tokens_since_fired[:dead] = trainee.assembly.dead_after_tokens
        torch.cuda.synchronize()
        start = time.perf_counter()
        for index in range(LOOK_EVERY):
            trainee.step(sizes[index % 2])
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / LOOK_EVERY * 1e3)
    reserved = torch.cuda.memory_reserved() / 2**30
    tell(f"{what}: a step while latents die", found, replayed=trainee.replays.served - served, reserved_GiB=reserved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, action="append")
    parser.add_argument("--variant", action="append")
    parser.add_argument("--profile", action="store_true", help="Also list the kernels that take most of a step's time.")
    args = parser.parse_args()
    if not has_triton(torch.device("cuda:0")):
        raise SystemExit("our kernels do not run here")
    for width in args.width or (16384, 65536):
        measure(width)
        torch.cuda.empty_cache()
        for variant in args.variant or ("topk", "batchtopk", "matryoshka"):
            step(variant, width, args.profile)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
