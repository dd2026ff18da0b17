"""A run at work: everything that takes part in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...cache_schema import Store
from ..ask.records import RunConfig
from ..data.feed import Feed
from ..data.scaling import Stats
from ..engine.fleet import Fleet
from ..parallel.processes import Group
from .checkpoints import Keeper
from .folder import RunFolder
from .metrics import Watch


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
