"""Train our SAEs for the quality benchmark."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from fitting import ROWS, Ask, batches, norms, score, serve_fits

from saemill.cache_schema.allocator import keep_large_blocks
from saemill.train.data.batch import Batch
from saemill.train.data.scaling import Stats
from saemill.train.engine.step import Trainee
from saemill.train.kit.registry import config_type

PENALTY = ("standard", "gated", "p_anneal")


def stats_of(ask: Ask, scale: float) -> Stats:
    rows = next(batches(ask, 1)) * scale
    mean = rows.mean(0)
    return Stats(torch.full_like(mean, scale), mean, float((rows - mean).square().sum(1).mean()))


def fit(ask: Ask) -> dict[str, float]:
    keep_large_blocks()
    d_model = next(batches(ask, 1)).shape[1]
    scale = d_model**0.5 / norms(ask.folder)["mean"]
    cls = config_type(ask.variant)
    wanted = {"width": ask.width, "k": ask.k, "target_l0": ask.l0, "seed": ask.seed}
    wanted |= {"dead_after_tokens": ask.steps * ROWS // cls().dead_part()}
    wanted |= {"penalty": ask.coefficient} if ask.variant in PENALTY else {}
    known = {field.name for field in dataclasses.fields(cls)}
    config = cls(**{name: value for name, value in wanted.items() if name in known})
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=ask.lr))
    trainee = Trainee(ask.variant, config.build(d_model, stats_of(ask, scale)), ask.steps)
    for x in batches(ask):
        trainee.step(Batch(x * scale))
    return score(ask.folder, trainee.sae.encode, trainee.sae.decode, scale)


if __name__ == "__main__":
    serve_fits(fit)
