"""What the terms of a step see: a batch of rows, and everything that is computed from it once.

B rows, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..data.scaling import Stats
from .kernels.codes import Codes
from .model import SparseAutoencoder
from .side import Side

T = TypeVar("T")


def codes_of(view: View) -> Codes:
    return view.sae.codes(view.x, view.side)


def x_hat_of(view: View) -> Tensor:
    return view.sae.reconstruct(view.codes, view.side)


def residual_of(view: View) -> Tensor:
    return view.target - view.x_hat.detach()


def dead_latents_of(view: View) -> Tensor:
    wanted = view.dead if view.retired is None else view.dead & ~view.retired
    return wanted.nonzero().view(-1)


@dataclass(frozen=True, eq=False)
class View:
    """What the terms of a step see. Everything costly is computed once, when first asked for."""

    x: Tensor
    target: Tensor
    side: Side
    sae: SparseAutoencoder
    dead: Tensor  # bool [F], latents that have not fired for long
    stats: Stats  # of the target
    generator: torch.Generator
    retired: Tensor | None = None  # bool [F], latents that must stay silent
    listed_dead: Tensor | None = None  # the dead latents that the step has listed; listing them waits for a GPU
    residual_by: Callable[[View], Tensor] = residual_of  # a term that reconstructs its own way has it at no cost
    kept: dict[Callable[[View], Any], Any] = field(default_factory=dict)  # what was computed, by what computed it
    notes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def codes(self) -> Codes:
        return self.once(codes_of)

    @property
    def x_hat(self) -> Tensor:
        return self.once(x_hat_of)

    @property
    def residual(self) -> Tensor:
        """target - x_hat, without gradient."""
        return self.once(self.residual_by)

    @property
    def dead_latents(self) -> Tensor:
        """int64, the dead latents in rising order; those that were retired are past saving."""
        return self.once(dead_latents_of) if self.listed_dead is None else self.listed_dead

    def note(self, name: str, value: Tensor | float) -> None:
        """A number [] for the log, besides the losses; it stays on the device of the batch until somebody reads it."""
        is_tensor = isinstance(value, Tensor)  # of a parameter, which moves after the note
        self.notes[name] = value.detach().clone() if is_tensor else self.x.new_full((), value)

    def once(self, compute: Callable[[View], T]) -> T:
        """`compute(view)`, once for all who ask in this step: a function, or a method of a record that they share."""
        if compute not in self.kept:
            self.kept[compute] = compute(self)
        result: T = self.kept[compute]
        return result
