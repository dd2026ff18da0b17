"""What a recipe is: a run that can be called by its name, as data.

A study is a file in `train/recipes/` with a tuple `RUNS` of these records. Settings are written as on
the command line (`data.batch_tokens`, `course.epochs`, `optim.lr`, a variant's own names). They bow to
the limits of the store, as a variant's defaults do, and to whatever the command line says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    study: str = ""
    """The name of the file; the registry fills it in."""
