"""The way to a device, on which nothing waits: a GPU takes without a wait only what lies in page-locked memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def take_device(device: torch.device) -> None:
    """Make a GPU the one that this thread works on: streams, events and page-locked memory belong to one.

    Without a number it means the one that is this thread's already, and torch refuses to take it.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def send(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device."""
    if device.type != "cuda" or host.device.type != "cpu":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def fetch(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of a GPU's tensors in page-locked memory, with one wait for all; those of the host as they are."""
    fetched = {}
    for name, tensor in tensors.items():
        if tensor.device.type == "cuda":
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            fetched[name] = host.copy_(tensor, non_blocking=True)
        else:
            fetched[name] = tensor.cpu()
    for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return fetched
