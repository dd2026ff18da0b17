"""Where a run computes: its processes, this one's device, and how they tell each other of their SAEs."""

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
    """This one of the processes of a launch: what it computes on, and where it prints."""

    group: Group
    """All processes of the launch."""
    team: Group
    """Those of them that train the same SAEs as this one: all, or this one alone where SAEs are spread."""
    device: torch.device
    console: Console
    is_watched: bool = False
    """Whether others look on while runs train, which pages of them need."""

    @property
    def is_spread(self) -> bool:
        """Whether each process trains SAEs of its own."""
        return self.team is not self.group

    def collect(self, own: Mapping[str, Any], labels: Iterable[str]) -> dict[str, Any]:
        """What each process has of its SAEs, as JSON, in the order of the labels; a collective call. Of an SAE that
        several train it is what the first says."""
        found: dict[str, Any] = {}
        for text in reversed(self.group.texts(json.dumps(own))):
            found |= json.loads(text)
        return {label: found[label] for label in labels if label in found}

    @property
    def hardware(self) -> dict[str, Any]:
        """What a run is computed on here."""
        return describe_hardware(self.device) | {"processes": self.group.size}

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.group.rank == 0


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """For records of where numbers come from."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    name = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
    return {"device": f"{device.type}, {name}", "threads": torch.get_num_threads()}
