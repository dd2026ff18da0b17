"""Numbers and errors for a person: how many, how large, how long, what went wrong."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.filesize import decimal

NAMES_TOLD = 8


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def numbered(noun: str, numbers: Collection[int]) -> str:
    """`shard 1`, `shards 1, 4`, or none."""
    return f"{noun}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}" if numbers else "none"


def some_of(names: Sequence[str]) -> str:
    """The first of many names, and that there are others."""
    return ", ".join(names[:NAMES_TOLD]) + (", and others" if len(names) > NAMES_TOLD else "")


def say_size(number: int) -> str:
    """In the largest of bytes, kB, MB, GB, ... of which there is one."""
    return decimal(number, precision=2)


def say_time(seconds: float) -> str:
    for unit, length, from_length in (("hours", 3600, 7200), ("minutes", 60, 60)):
        if seconds >= from_length:
            return f"{seconds / length:,.1f} {unit}"
    return counted(max(1, round(seconds)), "second")


def first_line(error: BaseException) -> str:
    """What another library says at first, or the kind of its error where it says nothing. Of a hub's answer what the
    hub says: the first line of its error may be the request's number."""
    said = getattr(error, "server_message", None) or str(error)
    return said.strip().partition("\n")[0] or type(error).__name__
