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
    memory: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def codes(self) -> Codes:
        return self.once("codes", lambda: self.sae.codes(self.x, self.side))

    @property
    def x_hat(self) -> Tensor:
        return self.once("x_hat", lambda: self.sae.reconstruct(self.codes, self.side))

    @property
    def residual(self) -> Tensor:
        """target - x_hat, without gradient; a term that reconstructs its own way leaves it under this name."""
        return self.once("residual", lambda: self.target - self.x_hat.detach())

    @property
    def dead_latents(self) -> Tensor:
        """int64, the dead latents in rising order; those that were retired are past saving."""
        if self.listed_dead is not None:
            return self.listed_dead
        wanted = self.dead if self.retired is None else self.dead & ~self.retired
        return self.once("dead_latents", lambda: wanted.nonzero().view(-1))

    def note(self, name: str, value: Tensor | float) -> None:
        """A number [] for the log, besides the losses; it stays on the device of the batch until somebody reads it."""
        is_tensor = isinstance(value, Tensor)  # of a parameter, which moves after the note
        self.notes[name] = value.detach().clone() if is_tensor else self.x.new_full((), value)

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """A value that several terms share under one name, computed by the first."""
        if name not in self.memory:
            self.memory[name] = compute()
        result: T = self.memory[name]
        return result
