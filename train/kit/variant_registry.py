"""The registry of variants: every file of `train/variants/` is one, and its name is the variant's id."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...cache_schema.strict_json import from_json
from ..errors import ConfigInvalid
from ..file_registry import file_names, require_known

if TYPE_CHECKING:
    from .variant_contract import Variant

PACKAGE = __name__.rsplit(".", 2)[0] + ".variants"


def names() -> tuple[str, ...]:
    """All variants, sorted."""
    return file_names(PACKAGE)


def module(name: str) -> ModuleType:
    """The file of a variant."""
    require_known(name, names(), "variant", ConfigInvalid)
    return importlib.import_module(f"{PACKAGE}.{name}")


def config_type(name: str) -> type[Variant]:
    """The frozen `Config` of a variant."""
    from .variant_contract import Variant  # imported late: names alone must not wait for torch

    config = getattr(module(name), "Config", None)
    if not (isinstance(config, type) and issubclass(config, Variant)):
        raise ConfigInvalid(f"train/variants/{name}.py: expected a class Config that extends Variant, found {config!r}")
    return config


def read_settings(name: str, raw: Mapping[str, Any], where: str) -> Variant:
    """The settings of a variant from JSON. Those without `centre_by_mean` are from an earlier version, which did not
    centre the encoder's input by the mean."""
    cls = config_type(name)
    older = {"centre_by_mean": False} if hasattr(cls, "centre_by_mean") else {}
    return from_json(cls, {**older, **raw}, where)
