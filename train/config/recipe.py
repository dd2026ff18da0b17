"""Recipes: named runs, as data, and the registry of the studies that they make up.

Every file of `train/study_recipes/` is a study: `RUNS` is a tuple of these records, in order, and `EVALS` names the
study's own evaluations. Settings are written as on the command line (`data.batch_tokens`, `course.epochs`, `optim.lr`,
a variant's own names). The limits of the store apply to them, as to a variant's defaults, and the command line
overrides them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...cache_schema.strict_json import nearest
from ..errors import ConfigInvalid
from ..file_registry import file_names, require_known

PACKAGE = __name__.rsplit(".", 2)[0] + ".study_recipes"
AS_RECORDED: Mapping[str, Any] = {"optim.lr": 3e-4, "penalty": 0.04}
"""What the studies recorded for every run, with 2,304 latents on gemma-2-2b, layer 19."""

DECISIVE: Mapping[str, Any] = {"base": "topk", "k": 32, "width": 2304, "encoder_product": "float32"}
"""For the runs that decide a study: top-k, so that everything is compared at the same number of active latents, and
one precision of choosing them, whose default differs between variants."""
PROBES = ("sparse_probing", "scr", "tpp", "decoder_cosine")
"""Evaluations that no variant is trained on."""
HALF = "_half"


@dataclass(frozen=True)
class Sae:
    """One SAE of a run: its label, its variant, and the settings that differ from the variant's defaults."""

    label: str
    variant: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One run: SAEs that train side by side from one stream."""

    name: str
    about: str
    saes: tuple[Sae, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """For the stream (`data.`), the course (`course.`), and all SAEs that have a setting of this name."""
    seeds: int = 1
    """How many SAEs of each kind a study trains, differing by seed."""
    against: tuple[str, ...] = ()
    """Labels of the base and the controls that every other SAE of the run is compared with, seed by seed."""
    evals: tuple[str, ...] = ()
    """Evaluations of the run, in addition to core and the study's own."""
    costs: bool = False
    """Whether a study's table shows the time per step and the bytes of state of each SAE."""
    select: str = ""
    """The measure of `evals` by which a study names the run's best SAE, base and controls included."""
    study: str = ""
    """The name of the file; the registry fills it in."""


def half_of(recipe: Recipe) -> Recipe:
    """The base of a comparing run, alone and for half as long: it shows whether the run's budget matters."""
    about = f"the base of {recipe.name} alone, for half as long"
    saes = tuple(sae for sae in recipe.saes if sae.label == recipe.against[0])
    return replace(recipe, name=recipe.name + HALF, about=about, saes=saes, against=(), evals=())


def as_recorded(runs: Iterable[Recipe]) -> tuple[Recipe, ...]:
    """The same runs at the learning rate and penalty that the studies recorded, unless a run sets its own."""
    return tuple(replace(run, settings={**AS_RECORDED, **run.settings}) for run in runs)


def studies() -> tuple[str, ...]:
    """All studies, sorted."""
    return file_names(PACKAGE)


def runs_of(study: str) -> tuple[Recipe, ...]:
    require_known(study, studies(), "study", ConfigInvalid)
    runs: tuple[Recipe, ...] = importlib.import_module(f"{PACKAGE}.{study}").RUNS
    return tuple(replace(run, study=study, evals=("core", *own_evals(study), *run.evals)) for run in runs)


def own_evals(study: str) -> tuple[str, ...]:
    """Evaluations that measure what the study's SAEs are trained on."""
    return getattr(importlib.import_module(f"{PACKAGE}.{study}"), "EVALS", ())


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
