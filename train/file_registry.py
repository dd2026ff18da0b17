"""Registries: a package's modules, found by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from ..cache_schema.strict_json import nearest


def file_names(folders: Iterable[str]) -> tuple[str, ...]:
    """All modules of a package, given its `__path__`, sorted."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(folders)))


def require_known(name: str, known: Iterable[str], kind: str, error: type[Exception]) -> None:
    """Raise `error` for an unknown name, with the nearest known ones."""
    known = tuple(known)
    if name not in known:
        raise error(f"unknown {kind} {name!r}{nearest(name, known)}")


def import_file(package: str, name: str) -> ModuleType:
    """Import a module of a package."""
    return importlib.import_module(f"{package}.{name}")
