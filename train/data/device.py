"""The way to a device, on which nothing waits: a GPU takes without a wait only what lies in page-locked memory."""

from __future__ import annotations

import torch
from torch import Tensor


def take_device(device: torch.device) -> None:
    """Make a GPU the one that this thread works on: streams, events and page-locked memory belong to one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def send(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device."""
    if device.type != "cuda" or host.device.type != "cpu":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
