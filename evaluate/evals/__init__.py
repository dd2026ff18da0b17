"""The registry: every file of this folder is an evaluation, and its name is the evaluation's id.

A file has a frozen dataclass `Config` of JSON-able settings, `NEEDS`, and

    def evaluate(scene, subjects, config) -> Iterator[Result | Failure]

It gets all SAEs at once, so that the model runs once for all of them, and yields results as they come.
`SUMMARY`, if there is one, names the metrics for the console's table by dotted path.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ...train.file_registry import file_names, import_file, require_known
from ..errors import UnknownEval


def names() -> tuple[str, ...]:
    """All evaluations, sorted."""
    return file_names(__path__)


def module(name: str) -> ModuleType:
    """The file of an evaluation."""
    require_known(name, names(), "evaluation", UnknownEval)
    return import_file(__name__, name)


def config_type(name: str) -> type[Any]:
    """The frozen `Config` of an evaluation."""
    config: type[Any] = module(name).Config
    return config
