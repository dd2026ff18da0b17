"""`--spread`: which process trains which SAEs.

Every process reads the store for itself, the layers of its SAEs alone. All read the same pieces in the same order
at about the same time, so the disk is asked once and the page cache serves the others; what is done twice is
decoding, on each process's own cores. One reader for all would have to copy each block from process to process,
would hold all layers, and its end would be everybody's.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..config.run_config import Member, RunConfig
from ..errors import ConfigInvalid
from .memory_estimate import weight_bytes
from .site import Site


def members_of(config: RunConfig, d_model: int, site: Site) -> tuple[Member, ...]:
    """The SAEs that this process trains: all, or where they are spread its part of them."""
    if not site.is_spread:
        return config.members
    if config.course.shard_width:
        raise ConfigInvalid("course.shard_width gives each process parts of all SAEs, --spread some whole: choose one")
    processes, found = site.group.size, len(config.members)
    if found < processes:
        raise ConfigInvalid(
            f"--spread: expected an SAE or more for each of {processes} processes, found {found}: "
            "start fewer processes, or leave out --spread, and all of them work on every SAE"
        )
    return deal_members(config.members, processes, d_model)[site.group.rank]


def deal_members(members: Sequence[Member], processes: int, d_model: int) -> list[tuple[Member, ...]]:
    """The largest first, each to the process that has least so far, of several to one that reads its layers already.

    The first process has SAEs of single tokens if any has: it measures the shuffling, which is measured on those.
    """
    parts: list[list[Member]] = [[] for _ in range(processes)]
    sizes = {member.label: weight_bytes(member, d_model) for member in members}
    for member in sorted(members, key=lambda one: -sizes[one.label]):
        places = set(member.config.request().layers)

        def cost(part: list[Member], places: set = places) -> tuple[int, int]:
            known = {place for one in part for place in one.config.request().layers}
            return sum(sizes[one.label] for one in part), len(places - known)

        min(parts, key=cost).append(member)
    parts.sort(key=lambda part: all(one.config.request().windows for one in part))
    return [tuple(member for member in members if member in part) for part in parts]
