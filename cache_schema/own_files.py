"""Variants, evaluations and corpus sources that a user keeps outside the repository."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

EXTRA = "SAEMILL_EXTRA"


def and_own(folders: Iterable[str], below: str) -> list[str]:
    """A package's `__path__`, and the same place in the folder that SAEMILL_EXTRA names: its files are the package's
    too, and import from it as if they lay there."""
    extra = os.environ.get(EXTRA)
    if not extra:
        return list(folders)
    if not Path(extra).is_dir():
        warnings.warn(f"{EXTRA}={extra}: there is no such folder, so nothing of it is known", stacklevel=2)
    return [*folders, str(Path(extra).absolute() / below)]
