"""What a variant is made of, and how its parts see a batch.

An `Assembly` is a module, loss terms, constraints and knobs. A `Term` is a pure function of a `View`
and never sees its own weight or the step; weights and knobs are schedules. A `Constraint` acts on
the module before and after the optimiser. New behaviour comes from combining these parts:
`with_terms`, `without_terms`, `with_constraints`, `wrapped`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .optim import Optim
from .ranks import Ranks
from .sae.codes import Codes
from .sae.model import SparseAutoencoder
from .sae.scaling import Stats
from .sae.side import Side
from .schedules import Schedule

T = TypeVar("T")


@dataclass(frozen=True)
class Needs:
    """What a variant reads from the store.

    A row holds the activations of `inputs` side by side; the target those of `targets`, or the row
    itself. With `windows` the rows are those of whole windows, special tokens left out, and the side
    inputs `window` [B], `position` [B] and `row_of` [W, T] (-1 where there is no row) say which.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...] | None = None
    attention_layers: tuple[int, ...] = ()
    tokens: bool = False
    documents: bool = False
    positions: bool = False
    windows: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer whose activations are read, in rising order."""
        return tuple(sorted(set(self.inputs) | set(self.targets or ())))


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of scaled activations, float32, on the SAE's device. B rows."""

    x: Tensor  # [B, D_in]
    target: Tensor | None = None  # [B, D_out], x itself without
    side: Mapping[str, Any] = field(default_factory=dict)


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
    memory: dict[str, Any] = field(default_factory=dict)

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
        """int64, the dead latents in rising order."""
        return self.once("dead_latents", lambda: self.dead.nonzero().view(-1))

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """A value that several terms share under one name, computed by the first."""
        if name not in self.memory:
            self.memory[name] = compute()
        result: T = self.memory[name]
        return result


@dataclass(frozen=True)
class Term:
    """One loss: weight(step) * fn(view) is added to the total."""

    name: str
    fn: Callable[[View], Tensor]
    weight: Schedule


class Constraint(Protocol):
    """Keeps the weights where they belong."""

    def before_step(self, sae: SparseAutoencoder) -> None:
        """Gradients are there, the optimiser has not moved."""
        ...

    def after_step(self, sae: SparseAutoencoder) -> None:
        """The optimiser has moved."""
        ...


@dataclass(frozen=True, eq=False)
class Assembly:
    """An SAE with all that training it takes; knows no data and no files."""

    sae: SparseAutoencoder
    terms: tuple[Term, ...]
    constraints: tuple[Constraint, ...]
    knobs: Mapping[str, Schedule]
    optim: Optim
    dead_after_tokens: int
    generator: torch.Generator  # of everything random in training
    input_stats: Stats
    target_stats: Stats

    def with_terms(self, *terms: Term) -> Assembly:
        """The same with more terms; names must be new."""
        names = [term.name for term in (*self.terms, *terms)]
        if len(set(names)) < len(names):
            raise ValueError(f"expected distinct names of terms, found {names}")
        return replace(self, terms=(*self.terms, *terms))

    def without_terms(self, *names: str) -> Assembly:
        """The same without the terms of these names, all of which must exist."""
        missing = set(names) - {term.name for term in self.terms}
        if missing:
            raise ValueError(f"expected terms named {sorted(missing)}, found {[t.name for t in self.terms]}")
        return replace(self, terms=tuple(term for term in self.terms if term.name not in names))

    def with_constraints(self, *constraints: Constraint) -> Assembly:
        return replace(self, constraints=(*self.constraints, *constraints))

    def with_knobs(self, **knobs: Schedule) -> Assembly:
        return replace(self, knobs={**self.knobs, **knobs})

    def wrapped(self, wrap: Callable[[SparseAutoencoder], SparseAutoencoder]) -> Assembly:
        """The same around another module made from this one's."""
        return replace(self, sae=wrap(self.sae))

    def side(self, batch_side: Mapping[str, Any], step: int, total_steps: int, ranks: Ranks) -> Side:
        """Side inputs of a batch together with the knobs of a step."""
        knobs = {name: schedule(step, total_steps) for name, schedule in self.knobs.items()}
        return Side(batch_side, knobs, ranks)
