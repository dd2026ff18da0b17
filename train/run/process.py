"""Where a run computes: its processes, this one's device, and how they exchange reports about their SAEs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from ..parallel.processes import Group


@dataclass(frozen=True, eq=False)
class Process:
    """One of the processes of a launch, this one: what it computes on, and where it prints."""

    group: Group
    """All processes of the launch."""
    team: Group
    """Those that train the same SAEs as this one: all, or only this one if SAEs are spread."""
    device: torch.device
    console: Console
    is_watched: bool = False
    """Whether to call onlookers while runs train, as a page about a run needs."""

    @property
    def is_spread(self) -> bool:
        """Whether each process trains SAEs of its own."""
        return self.team is not self.group

    def collect(self, own: Mapping[str, Any], labels: Iterable[str]) -> dict[str, Any]:
        """What every process reports about its SAEs, as JSON, in the order of the labels; a collective call. If several
        processes train an SAE, the first one's report is used."""
        found: dict[str, Any] = {}
        for text in reversed(self.group.texts(json.dumps(own))):
            found |= json.loads(text)
        return {label: found[label] for label in labels if label in found}

    @property
    def hardware(self) -> dict[str, Any]:
        """The hardware that a run uses here."""
        return describe_hardware(self.device) | {"processes": self.group.size}

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.group.rank == 0


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """A record of the device, to keep with numbers measured on it."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    name = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
    return {"device": f"{device.type}, {name}", "threads": torch.get_num_threads()}
