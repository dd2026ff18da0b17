"""Copies to and from a device without waiting, for which a GPU needs page-locked memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def take_device(device: torch.device) -> None:
    """Make a GPU this thread's current device: streams, events and page-locked memory belong to that device.

    A device without a number is already the thread's current one, and torch refuses to set it.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


class NotRecordable(Exception):
    """Raised in a step that does something on the host, which a replay of its launches would not repeat."""


def is_recording() -> bool:
    """Whether this thread's launches are being recorded instead of executed."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_recording(why: str) -> None:
    if is_recording():
        raise NotRecordable(why)


def page_locked(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor from which this device can copy without waiting."""
    return host.pin_memory() if device.type == "cuda" and host.device.type == "cpu" else host


def send(host: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device."""
    if host.device != device:
        refuse_recording("it sends numbers from the host")
    return page_locked(host, device).to(device, non_blocking=device.type == "cuda")


def fetch(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of a GPU's tensors in page-locked memory, with a single wait; host tensors are returned as they are."""
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
