"""What the terms of a step see: a batch of rows, and everything computed from it.

B rows, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from ..data.device_copies import send
from ..data.scaling import Stats
from .kernels.codes import Codes
from .model import SparseAutoencoder
from .side_inputs import Side

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F")
Split = Literal["alike", "parts"]


def split(kind: Split) -> Callable[[F], F]:
    """Mark a term as usable with a dictionary split by latents: each process computes the same value ("alike"), or a
    part of a sum ("parts"). A term without the mark needs all latents in one process."""

    def mark(fn: F) -> F:
        setattr(fn, "split", kind)  # noqa: B010 (any function or class)
        return fn

    return mark


def once(compute: Callable[P, T]) -> Callable[P, T]:
    """Compute a function of a view, or a method of a frozen record, once per step for all callers."""

    @wraps(compute)
    def cached(*args: P.args, **none: P.kwargs) -> T:
        *record, view = args
        key = (compute, *record)
        cache: dict[Any, T] = cast(View, view).cache
        if key not in cache:
            cache[key] = compute(*args, **none)
        return cache[key]

    return cached


@once
def residual_of(view: View) -> Tensor:
    return view.target - view.x_hat.detach()


@dataclass(frozen=True, eq=False)
class DeadLatents:
    """M latents, each at most once; on a GPU some that are not dead fill the list."""

    latents: Tensor  # int64 [M]
    is_dead: Tensor | None = None  # bool [M]; None: all are

    def only(self, table: Tensor, dim: int = 0) -> Tensor:
        """A table with the latents along `dim`, with zeros for those that are not dead: they get no gradient."""
        if self.is_dead is None:
            return table
        shape = [1] * table.ndim
        shape[dim] = -1
        return torch.where(self.is_dead.view(shape), table, 0.0)


@dataclass(frozen=True, eq=False)
class View:
    """What the terms of a step see. Everything costly is computed once, when first requested."""

    x: Tensor
    target: Tensor
    side: Side
    sae: SparseAutoencoder
    dead: Tensor  # bool [F], latents that have not fired for a long time
    stats: Stats  # of the target
    generator: torch.Generator
    retired: Tensor | None = None  # bool [F], latents that auxiliary losses ignore
    list_dead: Callable[[], DeadLatents] | None = None  # those of the last look, as listing them waits for the GPU
    residual_by: Callable[[View], Tensor] = residual_of  # a term with its own reconstruction already has the residual
    moments: Callable[[nn.Parameter], tuple[Tensor, ...]] = lambda _: ()  # the optimiser's, for code that moves entries
    draw_by: Callable[[Callable[[], Tensor], torch.device], Tensor] = lambda draw, device: send(draw(), device)
    cache: dict[Any, Any] = field(default_factory=dict)  # results of `once`, by function
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
    def dead_latents(self) -> DeadLatents:
        """The dead latents that auxiliary losses may use."""
        return DeadLatents(self.dead_and_wanted.nonzero().view(-1)) if self.list_dead is None else self.list_dead()

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
        """bool [F], the dead latents that do not fire in this batch either."""
        return self.dead & (self.fired == 0)

    def draw(self, on_host: Callable[[], Tensor]) -> Tensor:
        """What the host draws from the SAE's generator, on the device. A GPU may replay a step for other batches of the
        same shape: of the host's work only this function is done again, so it may depend on shapes alone. It outlives
        the step, whose tensors it would keep if it held the view."""
        return self.draw_by(on_host, self.x.device)

    def note(self, name: str, value: Tensor | float) -> None:
        """Add a scalar to the log; it stays on the batch's device until it is read."""
        is_tensor = isinstance(value, Tensor)  # cloned, because a parameter changes later
        self.notes[name] = value.detach().clone() if is_tensor else self.x.new_full((), value)
