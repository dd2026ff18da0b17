"""What a recipe is: a run that can be called by its name, as data.

A study is a file in `train/study_recipes/` with a tuple `RUNS` of these records. Settings are written as on
the command line (`data.batch_tokens`, `course.epochs`, `optim.lr`, a variant's own names). The
limits of the store bound them, as they bound a variant's defaults, and the command line overrides them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

AS_RECORDED: Mapping[str, Any] = {"optim.lr": 3e-4, "penalty": 0.04}
"""What the studies wrote down for every run: of 2,304 latents on gemma-2-2b, layer 19."""

DECISIVE: Mapping[str, Any] = {"base": "topk", "k": 32, "width": 2304, "encoder_product": "float32"}
"""Of the runs that decide a study: top-k, so that everything is compared at one number of active latents, chosen by
products of one precision, which variants have defaults of their own for."""
PROBES = ("sparse_probing", "scr", "tpp", "decoder_cosine")
"""What no variant is trained on."""


@dataclass(frozen=True)
class Sae:
    """One SAE of a run: what it is called, its variant, and where it departs from the variant's defaults."""

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
    """Of the stream (`data.`), of the course (`course.`), and of all SAEs that have a setting of the name."""
    seeds: int = 1
    """As many SAEs of each kind a study trains, that differ by their seed."""
    against: tuple[str, ...] = ()
    """Labels of the base and of the controls that every other SAE of the run is held against, seed by seed."""
    evals: tuple[str, ...] = ()
    """Evaluations of the run, beside core and the study's own."""
    costs: bool = False
    """A study's table says what a step of each SAE takes, and how many bytes its state has."""
    select: str = ""
    """A measure of `evals`: a study names the SAE of the run that is best at it, base and controls included."""
    study: str = ""
    """The name of the file; the registry fills it in."""


HALF = "_half"


def half_of(recipe: Recipe) -> Recipe:
    """The base of a run that compares, alone: for half as long, it shows whether the run's budget counts."""
    about = f"the base of {recipe.name} alone, for half as long"
    saes = tuple(sae for sae in recipe.saes if sae.label == recipe.against[0])
    return replace(recipe, name=recipe.name + HALF, about=about, saes=saes, against=(), evals=())


def as_recorded(runs: Iterable[Recipe]) -> tuple[Recipe, ...]:
    """The same runs at the learning rate and penalty that the studies wrote down, where a run has none of its own."""
    return tuple(replace(run, settings={**AS_RECORDED, **run.settings}) for run in runs)
