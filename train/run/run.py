"""A run at work: everything that takes part in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console

from ...cache_schema import Store
from ..ask.records import RunConfig
from ..data.feed import Feed
from ..engine.fleet import Fleet
from ..parallel.processes import Group
from .checkpoints import Saver
from .folder import RunFolder
from .metrics import Watch


@dataclass(frozen=True, eq=False)
class Site:
    """Where a run computes, and where it prints."""

    group: Group
    device: torch.device
    console: Console

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.group.rank == 0


@dataclass(frozen=True, eq=False)
class Run:
    """One stream, one fleet, one folder."""

    folder: RunFolder
    config: RunConfig
    total_steps: int
    store: Store
    feed: Feed
    fleet: Fleet
    watch: Watch
    saver: Saver
    site: Site
