"""Whether a disk has room for a model's files, asked before they are made or downloaded."""

from __future__ import annotations

from pathlib import Path

from ...cache_schema.files import free_bytes_at
from ..errors import ModelUnavailable


def require_room(name: str, needed: int, folder: Path) -> None:
    """Refuse to begin what the disk cannot hold."""
    free = free_bytes_at(folder)
    if needed > free:
        raise ModelUnavailable(
            f"{name}: its files take {needed / 1e9:,.1f} GB, but {folder} has {free / 1e9:,.1f} GB free. "
            "Free some space, or set HF_HOME to a folder on another disk"
        )
