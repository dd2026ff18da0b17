"""decoder_cosine: do latents write in directions of their own? From the weights alone: no store, no model.

The largest cosine of each latent's decoder row with another one's: an SAE whose latents were split or found twice
has many near 1. As many random directions of the same width are what to compare with. F latents, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache_schema.strict import to_json
from .contract import Context, Evaluation, LoadedSae, Result
from .core.weights import max_cosine

ALONE = "an SAE of one latent has no pair of latents to compare"


@dataclass(frozen=True)
class Config:
    threshold: float = 0.9
    """Latents with a neighbour at least so near count as doubled."""
    seed: int = 51_866
    """Of the random directions; not a small one, from which a dictionary may have been started."""


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result]:
    for subject in subjects:
        rows_FD = subject.sae.W_dec.detach().float()
        metrics = {"decoder_cosine": measure(rows_FD, config)} if len(rows_FD) > 1 else {}
        yield Result(subject, to_json(config), metrics, remark=None if metrics else ALONE)


def measure(rows_FD: Tensor, config: Config) -> dict[str, float]:
    """Over latents, each with its nearest neighbour."""
    nearest_F = max_cosine(rows_FD).double()
    chance = torch.randn(rows_FD.shape, generator=torch.Generator().manual_seed(config.seed)).to(rows_FD)
    return {
        "mean": float(nearest_F.mean()),
        "median": float(nearest_F.median()),
        "max": float(nearest_F.max()),
        "doubled_share": float((nearest_F >= config.threshold).double().mean()),
        "mean_chance": float(max_cosine(chance).double().mean()),
    }


EVALUATION = Evaluation(
    Config, evaluate, summary=("decoder_cosine.mean", "decoder_cosine.mean_chance", "decoder_cosine.doubled_share")
)
