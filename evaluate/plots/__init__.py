"""Pictures of results: the registry. Every file of this folder is a plot, and its name is the plot's id."""

from __future__ import annotations

import pkgutil


def names() -> tuple[str, ...]:
    """All plots, sorted."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__)))
