"""Recipes: runs with a name, as data.

A study is a file in `train/study_recipes/` with a tuple `RUNS` of these records. Settings are written as on
the command line (`data.batch_tokens`, `course.epochs`, `optim.lr`, a variant's own names). The
limits of the store apply to them, as to a variant's defaults, and the command line overrides them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

AS_RECORDED: Mapping[str, Any] = {"optim.lr": 3e-4, "penalty": 0.04}
"""What the studies recorded for every run, with 2,304 latents on gemma-2-2b, layer 19."""

DECISIVE: Mapping[str, Any] = {"base": "topk", "k": 32, "width": 2304, "encoder_product": "float32"}
"""For the runs that decide a study: top-k, so that everything is compared at the same number of active latents, chosen
at the same precision, for which variants have different defaults."""
PROBES = ("sparse_probing", "scr", "tpp", "decoder_cosine")
"""Evaluations that no variant is trained on."""


@dataclass(frozen=True)
class Sae:
    """One SAE of a run: its label, its variant, and where it departs from the variant's defaults."""

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
    """A measure of `evals`: a study names the best SAE of the run by it, base and controls included."""
    study: str = ""
    """The name of the file; the registry fills it in."""


HALF = "_half"


def half_of(recipe: Recipe) -> Recipe:
    """The base of a comparing run, alone and for half as long: it shows whether the run's budget matters."""
    about = f"the base of {recipe.name} alone, for half as long"
    saes = tuple(sae for sae in recipe.saes if sae.label == recipe.against[0])
    return replace(recipe, name=recipe.name + HALF, about=about, saes=saes, against=(), evals=())


def as_recorded(runs: Iterable[Recipe]) -> tuple[Recipe, ...]:
    """The same runs at the learning rate and penalty that the studies recorded, unless a run sets its own."""
    return tuple(replace(run, settings={**AS_RECORDED, **run.settings}) for run in runs)
