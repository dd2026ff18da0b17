"""What the terms of a step see: a batch of rows, and everything computed from it, each once.

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
    """Mark a term as usable with a dictionary split by latents: all processes compute the same value ("alike"), or each
    a part of a sum ("parts"). A term that is not marked needs all latents in one process."""

    def mark(fn: F) -> F:
        setattr(fn, "split", kind)  # noqa: B010 (any function or class)
        return fn

    return mark


def once(compute: Callable[P, T]) -> Callable[P, T]:
    """Compute a function of a view, or a method of a frozen record, once per step for all callers."""

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
    dead: Tensor  # bool [F], latents that have not fired for a long time
    stats: Stats  # of the target
    generator: torch.Generator
    retired: Tensor | None = None  # bool [F], latents that auxiliary losses ignore
    list_dead: Callable[[], Tensor] | None = None  # the dead latents of the last look: listing them waits for the GPU
    residual_by: Callable[[View], Tensor] = residual_of  # a term with its own reconstruction has it at no cost
    moments: Callable[[nn.Parameter], tuple[Tensor, ...]] = lambda _: ()  # the optimiser's, for code that moves entries
    kept: dict[Any, Any] = field(default_factory=dict)  # results of `once`, by their function
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
        """int64, the dead latents that auxiliary losses may use, in ascending order."""
        return self.dead_and_wanted.nonzero().view(-1) if self.list_dead is None else self.list_dead()

    @property
    def dead_and_wanted(self) -> Tensor:
        """bool [F], the dead latents, except those that auxiliary losses ignore."""
        return self.dead if self.retired is None else self.dead & ~self.retired

    @property
    @once
    def fired(self) -> Tensor:
        """int64 [F], the rows of the global batch in which each latent fires; a collective call the first time."""
        return self.side.ranks.sum(self.codes.fired)

    @property
    def still_dead(self) -> Tensor:
        """bool [F], the dead latents that also do not fire in this batch."""
        return self.dead & (self.fired == 0)

    def note(self, name: str, value: Tensor | float) -> None:
        """Add a scalar to the log, besides the losses; it stays on the batch's device until it is read."""
        is_tensor = isinstance(value, Tensor)  # cloned, as a parameter changes after this
        self.notes[name] = value.detach().clone() if is_tensor else self.x.new_full((), value)
