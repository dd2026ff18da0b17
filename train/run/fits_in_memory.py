"""Whether a run fits, before it starts: what it needs, in bytes, against what is free."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..config.run_config import Member
from ..errors import MemoryTooSmall

Widths = Callable[[str], int]  # of a hook's activations: those of keys are narrower than the residual, and z's wider
COPIES = 4  # weights, gradients, two moments, all in float32
_GIB = 2**30


def require_room(
    members: Iterable[Member], widths: Widths, batch_tokens: int, pool_bytes: int, parts: int, device: torch.device
) -> None:
    """Refuse a run that cannot fit: with what it needs, what is free, and what to change of the largest part."""
    members = tuple(members)
    weights = {member.label: weight_bytes(member, widths, parts) for member in members}
    largest = max(weights, key=lambda label: weights[label])
    step = max(step_bytes(member, widths, batch_tokens, parts) for member in members)
    whole = 0 if parts == 1 else max(whole_bytes(member, widths, batch_tokens) for member in members)
    asked = {
        f"for weights and optimiser, most of it for {largest}": sum(weights.values()),
        "for a step" if step > whole else "to measure and save the whole dictionary at the end": max(step, whole),
        "for the shuffle pool": pool_bytes,
    }
    remedies = (
        "a smaller --width, fewer SAEs at once, more processes with --spread, or with --set course.shard_width=true",
        "a smaller --set data.batch_tokens, or a smaller --width",
        "a smaller --set data.pool_tokens",
    )
    needed, free = sum(asked.values()), free_bytes(device)
    if needed > free:
        said = ", ".join(f"{size / _GIB:.1f} {what}" for what, size in asked.items())
        most = max(range(len(remedies)), key=lambda at: list(asked.values())[at])
        raise MemoryTooSmall(
            f"expected {needed / _GIB:.1f} GiB of memory on {device} ({said}), "
            f"found {free / _GIB:.1f} GiB free. Choose {remedies[most]}"
        )


def weight_bytes(member: Member, widths: Widths, parts: int = 1) -> int:
    """Weights and optimiser state of an SAE, or of the latents of a process that holds a part of them."""
    _, outputs = _widths(member, widths)
    inputs = member.config.layers_read() * widths(member.config.needs().hook)
    return COPIES * 4 * -(-member.config.width // parts) * (inputs + outputs)


def step_bytes(member: Member, widths: Widths, batch_tokens: int, parts: int = 1) -> int:
    """As many tables [B, F] as the variant says it holds at once, and a handful of the residual's width."""
    inputs, outputs = _widths(member, widths)
    tables = member.config.step_tables()
    return batch_tokens * int(4 * tables * -(-member.config.width // parts) + 4 * 4 * (inputs + outputs))


def whole_bytes(member: Member, widths: Widths, batch_tokens: int) -> int:
    """What the first process takes when a split dictionary is put together: its weights, and dense codes of a batch."""
    return weight_bytes(member, widths) // COPIES + 4 * batch_tokens * member.config.width


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take; those that were launched together on a host share it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_free_on_host(), _free_in_group()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _widths(member: Member, widths: Widths) -> tuple[int, int]:
    needs = member.config.needs()
    targets = needs.inputs if needs.targets is None else needs.targets
    return len(needs.inputs) * widths(needs.hook), len(targets) * widths(needs.to_hook or needs.hook)


def _free_on_host() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _free_in_group() -> int:
    """What a container's limit leaves; without one, no limit. Cached pages are given back when needed."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 2**62
    return 2**62 if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))
