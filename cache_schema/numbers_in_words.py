"""Counts, sizes, times and errors in readable words."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from rich.filesize import decimal

NAMES_SHOWN = 8


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def numbered(noun: str, numbers: Collection[int]) -> str:
    """`shard 1`, `shards 1, 4`, or `none`."""
    return f"{noun}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}" if numbers else "none"


def some_of(names: Sequence[str]) -> str:
    """The first few of many names, with a note if there are others."""
    return ", ".join(names[:NAMES_SHOWN]) + (", and others" if len(names) > NAMES_SHOWN else "")


def say_size(number: int) -> str:
    """The size in the largest unit (bytes, kB, MB, GB, ...) of which there is at least one."""
    return decimal(number, precision=2)


def say_time(seconds: float) -> str:
    for unit, length, from_length in (("hours", 3600, 7200), ("minutes", 60, 60)):
        if seconds >= from_length:
            return f"{seconds / length:,.1f} {unit}"
    return counted(max(1, round(seconds)), "second")


def say_busy() -> str:
    """A warning that this machine has been busy, so that a time measured on it may be too long; empty if it has not.
    Call it before measuring, which is itself load."""
    cores = os.cpu_count() or 1
    try:
        load = os.getloadavg()[0]
    except OSError:  # not on every system
        return ""
    if load <= cores / 2:
        return ""
    on = f"load {load:.1f} on {counted(cores, 'core')}"
    return f"this machine was busy in the last minute ({on}): if it still is, this takes less once it is idle"


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its type if that is empty. For a hub's error, of the server's
    message, because the error itself may start with a request id."""
    message = getattr(error, "server_message", None) or str(error)
    return message.strip().partition("\n")[0] or type(error).__name__
