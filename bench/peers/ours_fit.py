"""Train our SAEs for the quality benchmark."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from fitting import (
    CROSS_LAYER,
    TRANSCODERS,
    Ask,
    batches,
    load,
    pair_scales,
    scale_to_unit,
    score,
    score_map,
    serve_fits,
    split_pair,
    threshold_of,
)
from torch import Tensor

from saemill.cache_schema.keep_freed_memory import keep_large_blocks
from saemill.train.data.batch import Batch
from saemill.train.data.scaling import Stats
from saemill.train.engine.step import Trainee
from saemill.train.kit.variant_registry import config_type

PENALTY = ("standard", "gated", "p_anneal")


def stats_of(rows: Tensor, scale: Tensor) -> Stats:
    rows = rows * scale
    mean = rows.mean(0)
    variance = float((rows - mean).square().flatten(1).sum(1).mean())
    return Stats((torch.ones_like(mean) * scale).flatten(), mean.flatten(), variance)


def make_config(ask: Ask, first: Tensor) -> Any:
    cls = config_type(ask.variant)
    wanted = {"width": ask.width, "k": ask.k, "target_l0": ask.l0, "seed": ask.seed}
    wanted |= {"dead_after_tokens": ask.steps * ask.rows // cls().dead_part()}
    wanted |= {"penalty": ask.coefficient} if ask.variant in PENALTY else {}
    wanted |= {"gate": "topk"} if ask.variant in TRANSCODERS else {}  # as for the peer
    wanted |= {"hook": "mlp_in", "layers": tuple(range(first.shape[1]))} if ask.variant == CROSS_LAYER else {}
    known = {field.name for field in dataclasses.fields(cls)}
    config = cls(**{name: value for name, value in wanted.items() if name in known})
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=ask.lr))


def fit(ask: Ask) -> dict[str, Any]:
    keep_large_blocks()
    if ask.variant in (*TRANSCODERS, CROSS_LAYER):
        return fit_map(ask)
    scale, first = scale_to_unit(load(ask.folder, "train")), next(batches(ask, 1))
    trainee = Trainee(ask.variant, make_config(ask, first).build(first.shape[1], stats_of(first, scale)), ask.steps)
    for x in batches(ask):
        trainee.step(Batch(x * scale))
    gate = trainee.sae.gate
    threshold = gate.raw_threshold if ask.variant == "jumprelu" else threshold_of(ask, gate)
    return score(ask, trainee.sae.encode, trainee.sae.decode, float(scale), threshold)


def fit_map(ask: Ask) -> dict[str, Any]:
    """Train a transcoder; a cross-layer one reads its layers side by side."""
    scale, to = pair_scales(ask.folder)
    x, target = split_pair(next(batches(ask, 1)))
    assembly = make_config(ask, x).build(x.shape[-1], stats_of(x, scale), stats_of(target, to))
    trainee = Trainee(ask.variant, assembly, ask.steps)
    for rows in batches(ask):
        x, target = split_pair(rows)
        trainee.step(Batch((x * scale).flatten(1), (target * to).flatten(1)))
    sae = trainee.sae
    return score_map(ask, lambda x: sae.encode(x.flatten(1)), lambda x: sae(x.flatten(1)).view_as(x), scale, to)


if __name__ == "__main__":
    serve_fits(fit)
