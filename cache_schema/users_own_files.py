"""Variants, evaluations and corpus sources that a user keeps outside the repository."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

EXTRA = "SAEMILL_EXTRA"


def and_own(folders: Iterable[str], below: str) -> list[str]:
    """A package's `__path__` plus the same place in the folder that SAEMILL_EXTRA names: its files belong to the
    package too, and can import from it as if they were there."""
    extra = os.environ.get(EXTRA)
    if not extra:
        return list(folders)
    if not Path(extra).is_dir():
        raise SystemExit(f"error: {EXTRA}={extra}: there is no such folder. Correct the path, or unset {EXTRA}")
    own = Path(extra).absolute() / below
    there = {file.stem for folder in folders for file in Path(folder).iterdir()}
    if twice := sorted({file.stem for file in own.glob("[!_.]*")} & there):
        raise SystemExit(f"error: {own}: {', '.join(twice)}: saemill has a file of this name. Choose another")
    return [*folders, str(own)]


def digest_of_own(below: str = ".") -> str | None:
    """A digest of the Python files in that folder, or in one below it; None if SAEMILL_EXTRA is not set."""
    extra = os.environ.get(EXTRA)
    if not extra:
        return None
    digest = hashlib.sha256()
    for file in sorted(path for path in Path(extra, below).rglob("*.py") if path.is_file()):
        digest.update(os.fsencode(file.relative_to(extra)) + b"\0" + file.read_bytes() + b"\0")
    return f"sha256:{digest.hexdigest()}"
