"""Train our SAEs for the quality benchmark."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from fitting import ROWS, TRANSCODERS, Ask, batches, ends, load, score, score_map, serve_fits
from torch import Tensor

from saemill.cache_schema.allocator import keep_large_blocks
from saemill.train.data.batch import Batch
from saemill.train.data.scaling import Stats
from saemill.train.engine.step import Trainee
from saemill.train.kit.registry import config_type

PENALTY = ("standard", "gated", "p_anneal")


def stats_of(rows: Tensor, scale: float) -> Stats:
    rows = rows * scale
    mean = rows.mean(0)
    return Stats(torch.full_like(mean, scale), mean, float((rows - mean).square().sum(1).mean()))


def scale_to_unit(rows: Tensor) -> float:
    """To a mean norm of sqrt(D)."""
    return rows.shape[1] ** 0.5 / float(rows.norm(dim=1).double().mean())


def make_config(ask: Ask) -> Any:
    cls = config_type(ask.variant)
    wanted = {"width": ask.width, "k": ask.k, "target_l0": ask.l0, "seed": ask.seed}
    wanted |= {"dead_after_tokens": ask.steps * ROWS // cls().dead_part()}
    wanted |= {"penalty": ask.coefficient} if ask.variant in PENALTY else {}
    wanted |= {"gate": "topk"} if ask.variant in TRANSCODERS else {}  # as the peer's
    known = {field.name for field in dataclasses.fields(cls)}
    config = cls(**{name: value for name, value in wanted.items() if name in known})
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=ask.lr))


def fit(ask: Ask) -> dict[str, float]:
    keep_large_blocks()
    if ask.variant in TRANSCODERS:
        return fit_map(ask)
    scale, first = scale_to_unit(load(ask.folder, "train")), next(batches(ask, 1))
    trainee = Trainee(ask.variant, make_config(ask).build(first.shape[1], stats_of(first, scale)), ask.steps)
    for x in batches(ask):
        trainee.step(Batch(x * scale))
    return score(ask.folder, trainee.sae.encode, trainee.sae.decode, scale)


def fit_map(ask: Ask) -> dict[str, float]:
    """A transcoder: both ends have a scale of their own."""
    scale, target_scale = (scale_to_unit(rows) for rows in ends(load(ask.folder, "train")))
    x, target = ends(next(batches(ask, 1)))
    stats, target_stats = stats_of(x, scale), stats_of(target, target_scale)
    trainee = Trainee(ask.variant, make_config(ask).build(x.shape[1], stats, target_stats), ask.steps)
    for rows in batches(ask):
        x, target = ends(rows)
        trainee.step(Batch(x * scale, target * target_scale))
    sae = trainee.sae
    return score_map(ask.folder, lambda x: sae.encode(x * scale), lambda x: sae(x * scale) / target_scale)


if __name__ == "__main__":
    serve_fits(fit)
