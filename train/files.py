"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from ..cache_schema.files import sync


def replace_file(path: Path, data: bytes) -> None:
    """Write a file beside its place, flush it, and move it there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
