"""A run at work: everything that takes part in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..cache_schema import Store
from .config import RunConfig
from .data.feed import Feed
from .distributed import Group
from .fleet import Fleet
from .keeper import Keeper
from .runs import RunFolder
from .sae.scaling import Stats
from .watch import Watch


@dataclass(frozen=True, eq=False)
class Run:
    """One stream, one fleet, one folder."""

    folder: RunFolder
    config: RunConfig
    total_steps: int
    store: Store
    stats: Mapping[int, Stats]
    feed: Feed
    fleet: Fleet
    watch: Watch
    keeper: Keeper
    group: Group
    device: torch.device
