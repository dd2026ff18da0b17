"""The registry of recipes: every file of `train/study_recipes/` is a study. `RUNS` are its runs in order, `EVALS` its
own evaluations."""

from __future__ import annotations

import importlib
from dataclasses import replace

from ...cache_schema.strict_json import nearest
from ..errors import ConfigInvalid
from ..file_registry import file_names, import_file, require_known
from .recipe import HALF, Recipe, half_of

PACKAGE = __name__.rsplit(".", 2)[0] + ".study_recipes"


def studies() -> tuple[str, ...]:
    """All studies, sorted."""
    return file_names(importlib.import_module(PACKAGE).__path__)


def runs_of(study: str) -> tuple[Recipe, ...]:
    """The runs of a study."""
    require_known(study, studies(), "study", ConfigInvalid)
    runs: tuple[Recipe, ...] = import_file(PACKAGE, study).RUNS
    return tuple(replace(run, study=study, evals=("core", *own_evals(study), *run.evals)) for run in runs)


def own_evals(study: str) -> tuple[str, ...]:
    """Evaluations that measure what the study's SAEs are trained on."""
    return getattr(import_file(PACKAGE, study), "EVALS", ())


def find_recipes(name: str) -> tuple[Recipe, ...]:
    """The run that `study/run` names, or all runs of `study`. `study/run_half` is the base of a comparing run."""
    study, _, run = name.partition("/")
    runs = runs_of(study)
    if not run:
        return runs
    found = tuple(recipe for recipe in runs if recipe.name == run)
    found += tuple(half_of(recipe) for recipe in runs if recipe.against and recipe.name + HALF == run)
    if not found:
        raise ConfigInvalid(f"unknown run {run!r} of {study}{nearest(run, [recipe.name for recipe in runs])}")
    return found
