"""Our training steps for the benchmarks."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

if os.environ.get("WITHOUT_TRITON"):
    sys.modules["triton"] = None  # pyright: ignore  # as if it were not installed, to time our kernels' fallback

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from stepping import LONG, Settings, Step, serve_steps, sparse_bias, split_pairs

from saemill.cache_schema.keep_freed_memory import keep_large_blocks
from saemill.train.data.batch import Batch
from saemill.train.engine.step import Trainee
from saemill.train.kit.variant_registry import config_type
from saemill.train.sae.gates import JumpRelu
from saemill.train.sae.kernels.hardware import has_triton


def make_trainee(settings: Settings, x: torch.Tensor) -> Trainee:
    cls = config_type(settings.variant)
    product = "bfloat16" if settings.precision == "bfloat16" else "float32"
    wanted = {"width": settings.width, "k": settings.k, "target_l0": float(settings.k), "encoder_product": product}
    d_model = x.shape[1]
    if settings.layers:
        wanted |= {"hook": "mlp_in", "layers": tuple(range(settings.layers))}
        d_model //= 2 * settings.layers
    known = {field.name for field in dataclasses.fields(cls)}
    config = cls(**{name: value for name, value in wanted.items() if name in known})
    trainee = Trainee(settings.variant, config.build(d_model), total_steps=100_000, device=x.device)
    sae = trainee.sae
    with torch.no_grad():
        if settings.l0:
            bias = sparse_bias(sae.centred(x) @ sae.W_enc.t(), settings.l0)
            if isinstance(sae.gate, JumpRelu):
                sae.gate.raw_threshold.fill_(bias / sae.gate.unit)
            else:
                sae.b_enc.fill_(-bias)
        if settings.dead:
            sae.b_enc[: settings.num_dead] = -1e4
            trainee.counters.tokens_since_fired[: settings.num_dead] = 1000 * LONG
    trainee.step_index = 2000  # past every warm-up
    return trainee


def make_step(settings: Settings, batches: list[torch.Tensor]) -> Step:
    keep_large_blocks()
    device = batches[0].device
    if device.type == "cuda" and not os.environ.get("WITHOUT_TRITON") and not has_triton(device):
        raise SystemExit("our kernels do not run here, so this would time torch's")
    trainee = make_trainee(settings, batches[0])
    if settings.layers:
        pairs = split_pairs(batches)
        return lambda x: trainee.step(Batch(*pairs[id(x)]))
    return lambda x: trainee.step(Batch(x))


if __name__ == "__main__":
    serve_steps(make_step)
