"""What a launcher such as torchrun says in the environment of the processes that it starts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import LaunchInvalid
from .numbers_in_words import first_line


def count_processes(name: str = "WORLD_SIZE") -> int:
    """How many there are; one where none was launched."""
    said = os.environ.get(name, "1")
    if not re.fullmatch("[1-9][0-9]{0,8}", said):
        raise LaunchInvalid(f"{name}={said}: expected a number as torchrun sets it: unset it, or start by torchrun")
    return int(said)


def is_launched() -> bool:
    """Whether a launcher started this process, alone or with others."""
    return "WORLD_SIZE" in os.environ


@contextmanager
def joining() -> Iterator[None]:
    """An error of accelerate or torch while the processes meet is one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise LaunchInvalid(
            f"WORLD_SIZE={count_processes()}: expected that many processes that meet, found: {first_line(error)}: "
            "start them all by torchrun, or unset WORLD_SIZE. Of several hosts name the network that they share by "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error
