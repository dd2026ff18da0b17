"""What every contestant of the quality benchmark shares: the same rows in the same order, the same held-out score.

Imports only numpy and torch, so that this package and its peers each run in an environment of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from talk import serve

ROWS = 2048  # of a batch
Encode = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Ask:
    """One SAE to be trained."""

    folder: str
    variant: str
    width: int
    k: int
    coefficient: float
    lr: float  # 0: the contestant's own
    steps: int
    seed: int = 0  # of the weights and of the order of rows
    precision: str = "float32"


def batches(ask: Ask, steps: int | None = None) -> Iterator[torch.Tensor]:
    """Training rows, epoch by epoch in the order of one seed."""
    rows, steps = torch.from_numpy(np.load(Path(ask.folder) / "train.npy")), ask.steps if steps is None else steps
    generator = torch.Generator().manual_seed(ask.seed)
    order, at = torch.randperm(len(rows), generator=generator), 0
    for _ in range(steps):
        if at + ROWS > len(order):
            order, at = torch.randperm(len(rows), generator=generator), 0
        yield rows[order[at : at + ROWS]]
        at += ROWS


def norms(folder: str) -> dict[str, float]:
    """Mean norm and root mean square norm of the training rows."""
    lengths = torch.from_numpy(np.load(Path(folder) / "train.npy")).norm(dim=1).double()
    return {"mean": float(lengths.mean()), "rms": float(lengths.square().mean().sqrt())}


@torch.no_grad()
def score(folder: str, encode: Encode, decode: Encode, scale: float) -> dict[str, float]:
    """Held-out explained variance, L0 and the share of latents that never fire; the SAE reads x * scale."""
    rows = torch.from_numpy(np.load(Path(folder) / "held_out.npy")) * scale
    error, active, fired = 0.0, 0, torch.zeros(0, dtype=torch.bool)
    for x in rows.split(ROWS):
        acts = encode(x)
        error += float((x - decode(acts)).double().square().sum())
        active += int((acts > 0).sum())
        fired = (acts > 0).any(0) if not len(fired) else fired | (acts > 0).any(0)
    spread = float((rows - rows.mean(0)).double().square().sum())
    found = {"explained_variance": 1 - error / spread, "l0": active / len(rows)}
    return found | {"dead": float((~fired).double().mean())}


def serve_fits(fit: Callable[[Ask], dict[str, float]]) -> None:
    """A request is an SAE to be trained, its answer the held-out score."""
    serve(lambda request: fit(Ask(**request)))
