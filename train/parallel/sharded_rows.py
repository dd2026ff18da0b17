"""Tensors of which each process holds some rows (torch's DTensor), beside plain ones.

A dictionary too wide for one device lies in shards along F: weights and both moments by rows, put
together for a step and taken apart again by FSDP. What works row by row works on the local rows.
They are recognised by their methods: importing DTensor takes a second, and most runs have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Shard = Callable[[nn.Module], None]  # deals out a module's parameters, in place


def local(tensor: Tensor) -> Tensor:
    """This process's rows, sharing their memory."""
    return _as_sharded(tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows, gathered from all processes; a collective call."""
    return _as_sharded(tensor).full_tensor() if is_sharded(tensor) else tensor


def on_host(tensor: Tensor) -> Tensor:
    """All rows of a sharded tensor, in host memory, as no device may have room for all; others as they are."""
    return whole(tensor).cpu() if is_sharded(tensor) else tensor


def assign(target: Tensor, values: Tensor) -> None:
    """Give a tensor new values, which are whole: each process takes its rows."""
    if not is_sharded(target):
        target.copy_(values)
        return
    from torch.distributed.tensor import distribute_tensor

    sharded = _as_sharded(target)
    values = values.to(target.device)
    local(target).copy_(distribute_tensor(values, sharded.device_mesh, sharded.placements).to_local())


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _as_sharded(tensor: Any) -> Any:
    return tensor
