"""What the terms of a step see: a batch of rows, and everything that is computed from it once.

B rows, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from ..data.scaling import Stats
from .kernels.codes import Codes
from .model import SparseAutoencoder
from .side_inputs import Side

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F")
Split = Literal["alike", "parts"]


def split(kind: Split) -> Callable[[F], F]:
    """Marks a term that a dictionary split by latents may have: all processes find its value alike, or each a part
    of a sum. A term that is not marked needs all latents in one process."""

    def mark(fn: F) -> F:
        setattr(fn, "split", kind)  # noqa: B010 (of any function or class)
        return fn

    return mark


def once(compute: Callable[P, T]) -> Callable[P, T]:
    """A function of a view, or a method of a frozen record: computed once in a step, for all who call it."""

    @wraps(compute)
    def kept(*args: P.args, **none: P.kwargs) -> T:
        *record, view = args
        key = (compute, *record)
        values: dict[Any, T] = cast(View, view).kept
        if key not in values:
            values[key] = compute(*args, **none)
        return values[key]

    return kept


@once
def residual_of(view: View) -> Tensor:
    return view.target - view.x_hat.detach()


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
    retired: Tensor | None = None  # bool [F], latents that auxiliary losses leave alone
    listed_dead: Tensor | None = None  # the dead latents that the step has listed; listing them waits for a GPU
    residual_by: Callable[[View], Tensor] = residual_of  # a term that reconstructs its own way has it at no cost
    moments: Callable[[nn.Parameter], tuple[Tensor, ...]] = lambda _: ()  # the optimiser's, for whoever moves entries
    kept: dict[Any, Any] = field(default_factory=dict)  # what was computed `once`, by what computed it
    notes: dict[str, Tensor] = field(default_factory=dict)

    @property
    @once
    def codes(self) -> Codes:
        return self.sae.codes(self.x, self.side)

    @property
    @once
    def x_hat(self) -> Tensor:
        return self.sae.skip(self.x, self.sae.reconstruct(self.codes, self.side))

    @property
    def residual(self) -> Tensor:
        """target - x_hat, without gradient."""
        return self.residual_by(self)

    @property
    @once
    def dead_latents(self) -> Tensor:
        """int64, those that are dead and wanted, in rising order."""
        return self.dead_and_wanted.nonzero().view(-1) if self.listed_dead is None else self.listed_dead

    @property
    def dead_and_wanted(self) -> Tensor:
        """bool [F], the dead latents but for those that auxiliary losses leave alone."""
        return self.dead if self.retired is None else self.dead & ~self.retired

    @property
    @once
    def fired(self) -> Tensor:
        """int64 [F], in how many rows of the global batch each latent fires; a collective call, the first time."""
        return self.side.ranks.sum(self.codes.fired)

    @property
    def still_dead(self) -> Tensor:
        """bool [F], the dead latents that do not fire in this batch either."""
        return self.dead & (self.fired == 0)

    def note(self, name: str, value: Tensor | float) -> None:
        """A number [] for the log, besides the losses; it stays on the device of the batch until somebody reads it."""
        is_tensor = isinstance(value, Tensor)  # of a parameter, which moves after the note
        self.notes[name] = value.detach().clone() if is_tensor else self.x.new_full((), value)
