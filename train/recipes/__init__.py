"""The registry: every file of this folder is a study, and its `RUNS` are the study's runs in their order."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace

from ...cache_schema.strict import nearest
from ..errors import UnknownRecipe
from ..recipe import Recipe


def studies() -> tuple[str, ...]:
    """All studies, sorted."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__)))


def runs_of(study: str) -> tuple[Recipe, ...]:
    """The runs of a study."""
    if study not in studies():
        raise UnknownRecipe(f"unknown study {study!r}{nearest(study, studies())}")
    runs: tuple[Recipe, ...] = importlib.import_module(f"{__name__}.{study}").RUNS
    return tuple(replace(run, study=study) for run in runs)


def find_recipes(name: str) -> tuple[Recipe, ...]:
    """The run that `study/run` names, or all runs of `study`."""
    study, _, run = name.partition("/")
    runs = runs_of(study)
    if not run:
        return runs
    found = tuple(recipe for recipe in runs if recipe.name == run)
    if not found:
        raise UnknownRecipe(f"unknown run {run!r} of {study}{nearest(run, [recipe.name for recipe in runs])}")
    return found
