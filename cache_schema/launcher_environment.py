"""The environment variables that a launcher such as torchrun sets for its processes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import LaunchInvalid
from .numbers_in_words import first_line


def count_processes(name: str = "WORLD_SIZE") -> int:
    """The number of launched processes; one without a launcher."""
    count = os.environ.get(name, "1")
    if not re.fullmatch("[1-9][0-9]{0,8}", count):
        raise LaunchInvalid(f"{name}={count}: expected a number as torchrun sets it. Unset it, or start with torchrun")
    return int(count)


def is_launched() -> bool:
    """Whether a launcher started this process, alone or with others."""
    return "WORLD_SIZE" in os.environ


@contextmanager
def joining() -> Iterator[None]:
    """Turn an error of accelerate or torch while processes connect into one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise LaunchInvalid(
            f"WORLD_SIZE={count_processes()}: expected that many processes to connect, found: {first_line(error)}. "
            "Start them all with torchrun, or unset WORLD_SIZE. On several hosts, name their shared network in "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error
