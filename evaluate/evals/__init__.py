"""The registry: an evaluation is a file of this folder, or a folder with a file `evaluation.py`.

The name of the file or folder is the evaluation's id. Folders without that file (`probing`, `measures`) hold what
several evaluations share. An evaluation has a frozen dataclass `Config` of JSON-able settings, `NEEDS`, and

    def evaluate(context, subjects, config) -> Iterator[Result | Failure]

It gets all SAEs at once, so that the model runs once for all of them, and yields results as they come.
`SUMMARY`, if there is one, names the metrics for the console's table by dotted path.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from ...train.file_registry import file_names, import_file, require_known
from ..errors import UnknownEval


def names() -> tuple[str, ...]:
    """All evaluations, sorted."""
    return tuple(sorted(_modules()))


def module(name: str) -> ModuleType:
    """The file of an evaluation."""
    require_known(name, names(), "evaluation", UnknownEval)
    return import_file(__name__, _modules()[name])


def _modules() -> dict[str, str]:
    """Where each evaluation is, by its id."""
    folders = {file.parent.name for path in __path__ for file in Path(path).glob("*/__init__.py")}
    wholes = {file.parent.name for path in __path__ for file in Path(path).glob("*/evaluation.py")}
    files = set(file_names(__path__)) - folders
    return {name: name for name in files} | {name: f"{name}.evaluation" for name in wholes}


def config_type(name: str) -> type[Any]:
    """The frozen `Config` of an evaluation."""
    config: type[Any] = module(name).Config
    return config
