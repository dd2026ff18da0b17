"""Pictures of results: the registry. Every file of this folder is a plot, and its name is the plot's id.

A file has `draw(documents, folder) -> list[Path]`: it gets the documents of one run's results, writes
what it can make of them into the folder, and says what it wrote.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def names() -> tuple[str, ...]:
    """All plots, sorted."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__)))


def draw_all(documents: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Every plot that these documents have something for."""
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names()]
    return [path for module in modules for path in module.draw(documents, folder)]
