"""A run at work: everything that takes part in it."""

from __future__ import annotations

from dataclasses import dataclass

from ...cache_schema import Store
from ..config.run_config import RunConfig
from ..data.feed import Feed
from ..engine.fleet_of_saes import Fleet
from .checkpoint_times import Saver
from .folder import RunFolder
from .metrics import Watch
from .process import Process


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
    process: Process

    @property
    def labels(self) -> tuple[str, ...]:
        """All SAEs of the run; the fleet holds those of this process."""
        return tuple(member.label for member in self.config.members)
