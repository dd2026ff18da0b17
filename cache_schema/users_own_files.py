"""Variants, evaluations and corpus sources that a user keeps outside the repository."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

EXTRA = "SAEMILL_EXTRA"


def with_users_files(folders: Iterable[str], below: str) -> list[str]:
    """A package's `__path__` plus the same subfolder of SAEMILL_EXTRA, whose files become part of the package and can
    import from it."""
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


def digest_of_users_files(below: str = ".") -> str | None:
    """A digest of the Python files in SAEMILL_EXTRA, or in its subfolder `below`; None if that is not set."""
    extra = os.environ.get(EXTRA)
    if not extra:
        return None
    digest = hashlib.sha256()
    for file in sorted(path for path in Path(extra, below).rglob("*.py") if path.is_file()):
        digest.update(os.fsencode(file.relative_to(extra)) + b"\0" + file.read_bytes() + b"\0")
    return f"sha256:{digest.hexdigest()}"
