"""What all contestants of the quality benchmark share: the same rows in the same order, the same held-out score.

Imports only numpy and torch, so that this package and its peers can each run in an environment of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worker_pipe import serve

ROWS = 2048  # per batch
DEAD_PART = 30  # a latent is dead after a thirtieth of the run without firing: our default, used for the peers too
FEWER_ROWS = 512  # per batch of cross-layer transcoders, whose steps are a peer's slowest
TRANSCODERS = ("transcoder", "skip_transcoder")
CROSS_LAYER = "clt"
BY_THRESHOLD = ("batchtopk", "matryoshka", "jumprelu")
PLACED = 0.002  # a threshold is placed once the log of L0 over the wanted L0 is this small
Encode = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Ask:
    """One SAE to train."""

    folder: str
    variant: str
    width: int
    l0: float  # the wanted L0
    coefficient: float  # of the penalty, for variants that have one
    lr: float
    steps: int
    seed: int  # of the weights and of the order of rows

    @property
    def k(self) -> int:
        return round(self.l0)

    @property
    def rows(self) -> int:
        return FEWER_ROWS if self.variant == CROSS_LAYER else ROWS


def batches(ask: Ask, steps: int | None = None) -> Iterator[torch.Tensor]:
    """Batches of training rows, epoch by epoch, in an order drawn from the seed."""
    rows, steps = load(ask.folder, "train"), ask.steps if steps is None else steps
    generator = torch.Generator().manual_seed(ask.seed)
    order, at = torch.randperm(len(rows), generator=generator), 0
    for _ in range(steps):
        if at + ask.rows > len(order):
            order, at = torch.randperm(len(rows), generator=generator), 0
        yield rows[order[at : at + ask.rows]]
        at += ask.rows


def load(folder: str, split: str) -> torch.Tensor:
    return torch.from_numpy(np.load(Path(folder) / f"{split}.npy"))


def split_pair(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A transcoder's inputs and targets, which are stored side by side: [B, D], or [B, layers, D]."""
    x, target = rows.chunk(2, dim=1)
    return x.contiguous(), target.contiguous()


def scale_to_unit(rows: torch.Tensor) -> torch.Tensor:
    """The scale that gives a mean norm of sqrt(D), in each layer."""
    return (rows.shape[-1] ** 0.5 / rows.norm(dim=-1, keepdim=True).double().mean(0)).float()


def pair_scales(folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale of a transcoder's inputs, and that of its targets."""
    x, target = split_pair(load(folder, "train"))
    return scale_to_unit(x), scale_to_unit(target)


def norms(folder: str) -> dict[str, float]:
    """Mean norm and root mean square norm of the training rows."""
    lengths = load(folder, "train").norm(dim=1).double()
    return {"mean": float(lengths.mean()), "rms": float(lengths.square().mean().sqrt())}


def score(
    ask: Ask, encode: Encode, decode: Encode, scale: float, threshold: torch.Tensor | None = None
) -> dict[str, float | None]:
    """Score an SAE that reads x * scale on the test split, and on the validation split, which decides between fits.

    A `threshold` (one number, or one per latent) learned on training text lets more latents through on held-out text,
    so it is first scaled until L0 on validation text is the wanted one.
    """
    test, validation = (load(ask.folder, split) * scale for split in ("test", "validation"))
    came_to = None if threshold is None else place_threshold(threshold, encode, validation, ask.l0)
    scores = both_splits(*(measure(x, x, encode, lambda _, acts: decode(acts)) for x in (test, validation)))
    rebuild_windows(ask, encode, decode, scale)
    return scores | {"came_to": came_to}


@torch.no_grad()
def rebuild_windows(ask: Ask, encode: Encode, decode: Encode, scale: float) -> None:
    """Reconstruct the windows that will be spliced into the model, if there are any."""
    if Path(ask.folder, "windows.npy").is_file():
        parts = [decode(encode(part)) / scale for part in (load(ask.folder, "windows") * scale).split(ROWS)]
        np.save(Path(ask.folder, "rebuilt.npy"), torch.cat(parts).numpy())


@torch.no_grad()
def place_threshold(threshold: torch.Tensor, encode: Encode, rows: torch.Tensor, wanted: float) -> float:
    """Scale the threshold until `wanted` latents are active per row; return how many were active before."""
    found: list[float] = []  # L0 at each try
    before = step = 0.0  # log of L0 over the wanted L0, and of the factor then applied to the threshold
    slope = -1.0
    for _ in range(8):
        found.append(sum(int((encode(part) > 0).sum()) for part in rows.split(ROWS)) / len(rows))
        off = math.log(max(found[-1], 1e-3) / wanted)
        if abs(off) < PLACED:
            break
        if len(found) > 1:
            slope = min(-0.2, (off - before) / step)
        before, step = off, max(-0.7, min(0.7, -off / slope))
        threshold.mul_(math.exp(step))
    return found[0]


def score_map(
    ask: Ask, encode: Encode, rebuild: Encode, scale: torch.Tensor | float = 1.0, to: torch.Tensor | float = 1.0
) -> dict[str, float]:
    """Score a transcoder that maps x * scale to target * to; squares are summed over layers."""
    pairs = [split_pair(load(ask.folder, split)) for split in ("test", "validation")]
    return both_splits(*(measure(x * scale, target * to, encode, lambda x, _: rebuild(x)) for x, target in pairs))


def threshold_of(ask: Ask, autoencoder: Any) -> torch.Tensor | None:
    """The threshold that decides which latents are active at inference, if any; a top-k SAE's is not used."""
    return autoencoder.threshold if ask.variant in BY_THRESHOLD else None


def both_splits(test: dict[str, float], validation: dict[str, float]) -> dict[str, float]:
    return test | {"validation": validation["explained_variance"], "validation_l0": validation["l0"]}


@torch.no_grad()
def measure(
    rows: torch.Tensor,
    targets: torch.Tensor,
    encode: Encode,
    rebuild: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """Explained variance, L0 and the share of latents that never fire."""
    error, active, fired = 0.0, 0, torch.zeros(0, dtype=torch.bool)
    for x, target in zip(rows.split(ROWS), targets.split(ROWS), strict=True):
        acts = encode(x)
        error += float((target - rebuild(x, acts)).double().square().sum())
        active += int((acts > 0).sum())
        fired = (acts > 0).any(0) if not len(fired) else fired | (acts > 0).any(0)
    spread = float((targets - targets.mean(0)).double().square().sum())
    found = {"explained_variance": 1 - error / spread, "l0": active / len(rows)}
    return found | {"dead": float((~fired).double().mean())}


def serve_fits(fit: Callable[[Ask], dict[str, Any]]) -> None:
    """Answer requests to train an SAE with its held-out scores."""
    serve(lambda request: fit(Ask(**request)))
