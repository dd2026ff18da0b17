"""Registries: a package's modules, found by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable

from ..cache_schema.strict_json import nearest


def file_names(package: str) -> tuple[str, ...]:
    """All modules of a package, sorted."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(importlib.import_module(package).__path__)))


def require_known(name: str, known: Iterable[str], kind: str, error: type[Exception]) -> None:
    """Raise `error` for an unknown name, with the nearest known ones."""
    known = tuple(known)
    if name not in known:
        raise error(f"unknown {kind} {name!r}{nearest(name, known)}")
