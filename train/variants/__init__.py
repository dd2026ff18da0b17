"""The registry: every file of this folder is a variant, and its name is the variant's id."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ..errors import UnknownVariant
from ..registry import file_names, import_file, require_known


def names() -> tuple[str, ...]:
    """All variants, sorted."""
    return file_names(__path__)


def module(name: str) -> ModuleType:
    """The file of a variant."""
    require_known(name, names(), "variant", UnknownVariant)
    return import_file(__name__, name)


def config_type(name: str) -> type[Any]:
    """The frozen `Config` of a variant."""
    config: type[Any] = module(name).Config
    return config
