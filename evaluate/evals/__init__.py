"""The registry: every file in this folder, and every folder with a file `evaluation.py`, is an evaluation.

`evaluation_contract` documents what such a file defines. The name of the file or folder is the evaluation's id. Folders
without `evaluation.py` (`probing`, `measures`) hold code that several evaluations share.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache_schema.users_own_files import with_users_files
from ...train.file_registry import file_names, require_known
from ..errors import EvaluationInvalid, UnknownEval

if TYPE_CHECKING:
    from .evaluation_contract import Evaluation

__path__ = with_users_files(__path__, "evaluate/evals")

CONTRACT = "evaluation_contract"
ALL = "all"
"""Stands for every evaluation."""


def names() -> tuple[str, ...]:
    """All evaluations, sorted."""
    return tuple(sorted(_modules()))


def load(name: str) -> Evaluation[Any]:
    require_known(name, names(), "evaluation", UnknownEval)
    from .evaluation_contract import Evaluation  # imported here, so that listing names does not import torch

    found = getattr(import_module(f"{__name__}.{_modules()[name]}"), "EVALUATION", None)
    if not isinstance(found, Evaluation):
        raise EvaluationInvalid(
            f"evaluation {name}: expected EVALUATION = Evaluation(...) in its file, found {found!r}"
        )
    return found


def is_own(name: str) -> bool:
    """Whether an evaluation is the user's own, outside the repository."""
    return any(Path(folder, place).exists() for folder in __path__[1:] for place in (name, f"{name}.py"))


def _modules() -> dict[str, str]:
    """The module of each evaluation, by id."""
    packages = {file.parent.name for path in __path__ for file in Path(path).glob("*/__init__.py")}
    folders = {file.parent.name for path in __path__ for file in Path(path).glob("*/evaluation.py")}
    files = set(file_names(__name__)) - packages - {CONTRACT}
    return {name: name for name in files} | {name: f"{name}.evaluation" for name in folders}
