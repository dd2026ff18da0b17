"""Train one of our SAEs for the quality benchmark: folder, variant, width, k, coefficient, lr, steps, product."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from fitting import ROWS, batches, norms, tell_score

from saemill.cache_schema.allocator import keep_large_blocks
from saemill.train.data.batch import Batch
from saemill.train.data.scaling import Stats
from saemill.train.engine.step import Trainee
from saemill.train.kit.build import dead_after
from saemill.train.kit.registry import config_type

COEFFICIENT = {"standard": "penalty", "gated": "penalty", "p_anneal": "penalty", "jumprelu": "target_l0"}


def stats_of(folder: str, scale: float) -> Stats:
    rows = next(batches(folder, 1)) * scale
    mean = rows.mean(0)
    return Stats(torch.full_like(mean, scale), mean, float((rows - mean).square().sum(1).mean()))


def main(folder: str, variant: str, width: str, k: str, coefficient: str, lr: str, steps: str, product: str) -> None:
    keep_large_blocks()
    d_model = next(batches(folder, 1)).shape[1]
    scale = d_model**0.5 / norms(folder)["mean"]
    cls = config_type(variant)
    wanted = {"width": int(width), "k": int(k), "encoder_product": product}
    wanted |= {"dead_after_tokens": dead_after(int(steps) * ROWS, cls)}
    wanted |= {COEFFICIENT.get(variant, ""): float(coefficient)}
    known = {field.name for field in dataclasses.fields(cls)}
    config = cls(**{name: value for name, value in wanted.items() if name in known})
    if float(lr):
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=float(lr)))
    trainee = Trainee(variant, config.build(d_model, stats_of(folder, scale)), int(steps))
    for x in batches(folder, int(steps)):
        trainee.step(Batch(x * scale))
    tell_score(folder, trainee.sae.encode, trainee.sae.decode, scale)


if __name__ == "__main__":
    main(*sys.argv[1:])
