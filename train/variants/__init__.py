"""The registry: every file of this folder is a variant, and its name is the variant's id."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from ...cache_schema.strict import nearest
from ..errors import UnknownVariant


def names() -> tuple[str, ...]:
    """All variants, sorted."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__)))


def module(name: str) -> ModuleType:
    """The file of a variant."""
    if name not in names():
        raise UnknownVariant(f"unknown variant {name!r}{nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def config_type(name: str) -> type[Any]:
    """The frozen `Config` of a variant."""
    config: type[Any] = module(name).Config
    return config
