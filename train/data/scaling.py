"""The units in which SAEs train: activations scaled so that their mean norm is sqrt(D).

The scale comes from the store's moments, or from those of its ordinary rows if massive ones are left out. It is
the same for every SAE of a run, and is folded into the weights when an SAE is saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache_schema import Moments
from ...cache_schema.massive_activations import Massive
from ...cache_schema.sites import Place


@dataclass(frozen=True, eq=False)
class Stats:
    """What training knows about the activations, in scaled units. D width."""

    scale: Tensor  # [D], raw activation * scale = scaled activation; constant inside a layer
    mean: Tensor  # [D]
    variance: float  # E||x - mean||^2
    massive: Massive | None = None  # the rows that are left out; None if every row counts

    @property
    def width(self) -> int:
        return self.mean.numel()


def stats_from_moments(moments: Moments) -> Stats:
    mean = torch.from_numpy(moments.mean).double()
    scale = mean.numel() ** 0.5 / moments.mean_norm
    return Stats(
        torch.full((mean.numel(),), scale, dtype=torch.float32),
        (mean * scale).float(),
        moments.total_variance * scale**2,
    )


def bounds_of(stats: Mapping[Place, Stats]) -> dict[Place, float]:
    """The norm above which a raw row is massive, for layers whose massive rows are left out."""
    return {layer: one.massive.bound for layer, one in stats.items() if one.massive is not None}


def unit_stats(width: int) -> Stats:
    """Statistics of activations that are already scaled and have zero mean."""
    return Stats(torch.ones(width), torch.zeros(width), float(width))


def joined_stats(parts: Sequence[Stats]) -> Stats:
    """Statistics of several layers side by side."""
    return Stats(
        torch.cat([part.scale for part in parts]),
        torch.cat([part.mean for part in parts]),
        sum(part.variance for part in parts),
    )
