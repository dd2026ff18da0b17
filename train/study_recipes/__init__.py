"""The registry: every file of this folder is a study. `RUNS` are its runs in their order, `EVALS` its own measures."""

from __future__ import annotations

from dataclasses import replace

from ...cache_schema.strict_json import nearest
from ..config.recipe import HALF, Recipe, half_of
from ..errors import ConfigInvalid
from ..file_registry import file_names, import_file, require_known


def studies() -> tuple[str, ...]:
    """All studies, sorted."""
    return file_names(__path__)


def runs_of(study: str) -> tuple[Recipe, ...]:
    """The runs of a study."""
    require_known(study, studies(), "study", ConfigInvalid)
    runs: tuple[Recipe, ...] = import_file(__name__, study).RUNS
    return tuple(replace(run, study=study, evals=("core", *own_evals(study), *run.evals)) for run in runs)


def own_evals(study: str) -> tuple[str, ...]:
    """Evaluations that measure what the study's SAEs are trained on."""
    return getattr(import_file(__name__, study), "EVALS", ())


def find_recipes(name: str) -> tuple[Recipe, ...]:
    """The run that `study/run` names, or all runs of `study`. `study/run_half` is the base of a run that compares."""
    study, _, run = name.partition("/")
    runs = runs_of(study)
    if not run:
        return runs
    found = tuple(recipe for recipe in runs if recipe.name == run)
    found += tuple(half_of(recipe) for recipe in runs if recipe.against and recipe.name + HALF == run)
    if not found:
        raise ConfigInvalid(f"unknown run {run!r} of {study}{nearest(run, [recipe.name for recipe in runs])}")
    return found
