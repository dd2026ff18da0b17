"""Our steps for the training benchmark: folder, variant, width, k, L0 (0: as initialised), clock, device, product."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from stepping import load_batches, serve, sparse_bias

from saemill.cache_schema.allocator import keep_large_blocks
from saemill.train.data.batch import Batch
from saemill.train.engine.step import Trainee
from saemill.train.kit.registry import config_type
from saemill.train.sae.gates import JumpRelu


def make_trainee(variant: str, width: int, k: int, l0: float, product: str, x: torch.Tensor) -> Trainee:
    cls = config_type(variant)
    wanted = {"width": width, "k": k, "target_l0": float(k), "encoder_product": product}
    known = {field.name for field in dataclasses.fields(cls)}
    config = cls(**{name: value for name, value in wanted.items() if name in known})
    trainee = Trainee(variant, config.build(x.shape[1]), total_steps=100_000, device=x.device)
    if l0:
        sae = trainee.sae
        with torch.no_grad():
            bias = sparse_bias(sae.centred(x) @ sae.W_enc.t(), l0)
            if isinstance(sae.gate, JumpRelu):
                sae.gate.raw_threshold.fill_(bias / sae.gate.unit)
            else:
                sae.b_enc.fill_(-bias)
    return trainee


def main(folder: str, variant: str, width: str, k: str, l0: str, clock: str, device: str, product: str) -> None:
    keep_large_blocks()
    batches = load_batches(folder, device)
    trainee = make_trainee(variant, int(width), int(k), float(l0), product, batches[0])
    serve(lambda x: trainee.step(Batch(x)), batches, clock)


if __name__ == "__main__":
    main(*sys.argv[1:])
