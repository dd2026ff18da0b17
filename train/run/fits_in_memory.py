"""Check before a run starts that it fits: the bytes it needs against those that are free."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...cache_schema.launcher_environment import count_processes
from ..config.run_config import Member
from ..disk.module_form import build_without_values
from ..engine.schedules import Constant
from ..engine.terms_and_constraints import Assembly
from ..errors import MemoryTooSmall, name_sae
from ..terms.auxk import AuxK

Widths = Callable[[str], int]  # width of a hook's activations: keys are narrower than the residual, z is wider
COPIES = 4  # weights, gradients, two moments, all in float32
ENCODE_TABLES = 3.0  # [B, F] in float32 that a saved SAE's `encode` holds at its peak (batchtopk, which holds the most)
NO_LIMIT = 2**62
_GIB = 2**30


def require_room(
    members: Sequence[Member],
    widths: Widths,
    rows: int,
    pool_bytes: int,
    parts: int,
    device: torch.device,
    held_out_rows: int = 0,
    team: int = 1,
) -> None:
    """Refuse a run that cannot fit, with what it needs, what is free, and how to reduce the largest part.

    `rows` is per process and step, `held_out_rows` per batch of the final measurement. By then the pool and the
    gradients are gone, and only one process of the `team` that trains the same SAEs measures, with the memory of all
    processes on its host.
    """
    weights = {member.label: weight_bytes(member, widths, parts) for member in members}
    largest, all_weights = max(weights, key=lambda label: weights[label]), sum(weights.values())
    step = max(step_bytes(member, widths, rows, parts) for member in members)
    end = max(end_bytes(member, widths, held_out_rows, parts) for member in members) // min(team, _sharers(device))
    end_weights = all_weights // COPIES * (COPIES - 1)
    for_weights = f"for weights and optimiser, most of it for {largest}"
    training = {for_weights: all_weights, "for a step": step, "for the shuffle pool": pool_bytes}
    ending = {for_weights: end_weights, "to measure and save an SAE at the end": end}
    peak = max(training, ending, key=lambda parts: sum(parts.values()))
    remedies = (
        "a smaller --width, fewer SAEs at once, more processes with --spread, or with --set course.shard_width=true",
        "a smaller --set data.batch_tokens, or a smaller --width",
        "a smaller --set data.pool_tokens",
    )
    needed, free = sum(peak.values()), free_bytes(device)
    if needed > free:
        parts_in_words = ", ".join(f"{size / _GIB:.1f} {what}" for what, size in peak.items())
        _, remedy = max(zip(peak.values(), remedies, strict=False), key=lambda pair: pair[0])
        raise MemoryTooSmall(
            f"expected {needed / _GIB:.1f} GiB of memory on {device} ({parts_in_words}), "
            f"found {free / _GIB:.1f} GiB free. Use {remedy}"
        )
    if device.type == "cuda":
        _require_host_room(members, widths, parts, team)


def _require_host_room(members: Sequence[Member], widths: Widths, parts: int, team: int) -> None:
    """Only the first process of a team copies a checkpoint to host memory; if latents are split, each process copies
    its part and the first joins them. At the start, each process builds a whole SAE before moving it, or its part, to
    its GPU."""
    host = torch.device("cpu")
    numbers = [size for member in members for size in _matrices(member, widths, parts)]
    own = (COPIES - 1) * sum(1 << (4 * size - 1).bit_length() for size in numbers)  # weights and moments, which stay
    weights = [weight_bytes(member, widths) // COPIES for member in members]
    each, first = (own, sum(weights) * (COPIES - 1)) if parts > 1 else (0, own)
    of_checkpoints, to_begin = each + first // min(team, _sharers(host)), max(weights)
    what = "for copying checkpoints from a GPU (page-locked, so each table takes a power of two)"
    if to_begin > of_checkpoints:
        what = "for each process to build a whole SAE before moving it, or its part, to its GPU"
    needed, free = max(of_checkpoints, to_begin), free_bytes(host)
    if needed > free:
        raise MemoryTooSmall(
            f"expected {needed / _GIB:.1f} GiB of host memory, {what}, found {free / _GIB:.1f} GiB free. Use a "
            "smaller --width, or fewer SAEs at once"
        )


def weight_bytes(member: Member, widths: Widths, parts: int = 1) -> int:
    """Weights and optimiser state of an SAE, or of the part of its latents that one process holds."""
    return COPIES * 4 * sum(_matrices(member, widths, parts))


def _matrices(member: Member, widths: Widths, parts: int) -> list[int]:
    """Size of each matrix: encoder, decoder, and any others, such as range encoders and compositions of tiers."""
    _, outputs = _widths(member, widths)
    inputs = member.config.layers_read() * widths(member.config.needs().hook)
    latents, assembly = -(-member.config.width // parts), build_shapes(member, widths)
    modules = () if assembly is None else (assembly.sae, *assembly.extras.values())
    others = [
        tensor.numel()
        for module in modules
        for name, tensor in module.named_parameters()
        if tensor.ndim > 1 and name.split(".")[-1] not in ("W_enc", "W_dec")
    ]
    return [latents * inputs, latents * outputs, *others]


def build_shapes(member: Member, widths: Widths) -> Assembly | None:
    """An SAE and what trains it, with shapes but no values; None for a user's variant that needs values."""
    with name_sae(member.label):  # the first time that it is built, so its config may refuse
        return build_without_values(lambda: member.config.build(widths(member.config.needs().hook)))


def step_bytes(member: Member, widths: Widths, batch_tokens: int, parts: int = 1) -> int:
    """The tables [B, F] that the variant holds at once, a few of the residual's width, and the rows of dead latents
    that the auxiliary loss copies: at worst the encoder and decoder rows of all latents."""
    inputs, outputs = _widths(member, widths)
    latents = -(-member.config.width // parts)
    assembly = build_shapes(member, widths)
    terms = () if assembly is None else assembly.terms
    has_aux = any(isinstance(term.fn, AuxK) and term.weight != Constant(0.0) for term in terms)
    copied = latents * (inputs + outputs) if has_aux else 0
    return batch_tokens * int(4 * member.config.step_tables() * latents + 4 * 4 * (inputs + outputs)) + 4 * copied


def end_bytes(member: Member, widths: Widths, batch_tokens: int, parts: int = 1) -> int:
    """What the first process needs to measure and save: dense codes of a whole batch and, if the dictionary is split, a
    joined copy of its weights."""
    weights = 0 if parts == 1 else weight_bytes(member, widths) // COPIES
    return weights + int(4 * ENCODE_TABLES * batch_tokens * member.config.width)


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take; processes launched together on a host share it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_free_on_host(), _free_in_group()) // _sharers(device)


def _sharers(device: torch.device) -> int:
    """How many processes of a launch share one memory."""
    return 1 if device.type == "cuda" else count_processes("LOCAL_WORLD_SIZE")


def _widths(member: Member, widths: Widths) -> tuple[int, int]:
    needs = member.config.needs()
    targets = needs.inputs if needs.targets is None else needs.targets
    return len(needs.inputs) * widths(needs.hook), len(targets) * widths(needs.to_hook or needs.hook)


def _free_on_host() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _free_in_group() -> int:
    """What the tightest limit of a container or cluster job leaves. A job's limit is in its own group, some folders
    below the root."""
    return min((_room_in(folder) for folder in _own_groups()), default=NO_LIMIT)


def _own_groups(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """Folders of this process's memory cgroups, each with its parents, for cgroup versions 1 and 2."""
    try:
        lines = [line.split(":", 2) for line in os.fsdecode(proc.read_bytes()).splitlines()]
    except OSError:
        return []
    found = []
    for _, kinds, path in lines:
        if kinds == "" or "memory" in kinds.split(","):
            top = root / "memory" if kinds else root
            inside = top / path.lstrip("/")
            found += [inside, *(above for above in inside.parents if above.is_relative_to(top))]
    return found


def _room_in(group: Path) -> int:
    """Cached file pages count as free, even active ones: the kernel reclaims them when needed."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit = (group / limit_name).read_text(encoding="utf-8").strip()
            used = int((group / used_name).read_text(encoding="utf-8"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        except (OSError, ValueError):
            continue
        cached = sum(int(stat.get(f"total_{kind}", stat.get(kind, 0))) for kind in ("inactive_file", "active_file"))
        return NO_LIMIT if limit == "max" else int(limit) - used + cached
    return NO_LIMIT
