"""The parts of a variant, and how they see a batch.

An `Assembly` is a module, loss terms, constraints and knobs. A `Term` is a pure function of a `View`
and never sees its own weight or the step; weights and knobs are schedules. A `Constraint` acts on
the module before and after the optimiser. New behaviour comes from combining these parts:
`with_terms`, `replacing`, `with_constraints`, `with_knobs`, `with_extra`, `with_sae`.

The functions at the end decide which SAEs can be split by latents, and which of their tensors are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from ..data.batch import Needs
from ..data.scaling import Stats
from ..errors import ConfigInvalid
from ..parallel.dictionary_over_processes import Latents
from ..sae.extra_modules import Extra
from ..sae.model import SparseAutoencoder
from ..sae.step_view import Split, View, residual_of
from .adam import Optim
from .schedules import Constant, Product, Schedule, cut_short


@dataclass(frozen=True)
class Term:
    """One loss: weight(step) * fn(view) is added to the total."""

    name: str
    fn: Callable[[View], Tensor]
    weight: Schedule
    residual: Callable[[View], Tensor] | None = None
    """For a term with its own reconstruction: the target - x_hat that it has already computed."""

    @property
    def split(self) -> Split | None:
        """How processes that hold some latents each compute it (see `step_view.split`); None: it needs all latents."""
        return getattr(self.fn, "split", None)


TableUse = Literal["none", "gradients", "unit decoder"]  # the last: only keeps decoder rows at length one


class Constraint:
    """Restricts weights or their gradients."""

    table_use: ClassVar[TableUse]
    """How it uses the gradients of the weight tables, which a step need not form if nothing reads them."""

    def before_step(self, sae: SparseAutoencoder) -> None:
        """Called when gradients are complete, before the optimiser."""

    def after_step(self, sae: SparseAutoencoder) -> None:
        """Called after the optimiser."""


class Buildable(Protocol):
    """What training needs of a variant's config; `kit/variant_contract.py` has the whole contract."""

    def needs(self) -> Needs: ...

    @property
    def build(self) -> Callable[..., Assembly]: ...


@dataclass(frozen=True, eq=False)
class Assembly:
    """An SAE with everything needed to train it; independent of data and files."""

    sae: SparseAutoencoder
    terms: tuple[Term, ...]
    constraints: tuple[Constraint, ...]
    knobs: Mapping[str, Schedule]
    optim: Optim
    dead_after_tokens: int
    generator: torch.Generator  # for everything random in training
    input_stats: Stats
    target_stats: Stats
    extras: Mapping[str, Extra] = field(default_factory=dict)
    phases: Schedule = field(default=Constant(1.0))
    """Multiplies the learning rate, for variants that train in phases."""

    def __post_init__(self) -> None:
        if self.dead_after_tokens < 1:
            raise ConfigInvalid(f"dead_after_tokens: expected 1 or more, found {self.dead_after_tokens}")

    @property
    def rate(self) -> Schedule:
        """The learning rate."""
        return Product((self.optim.schedule(), self.phases))

    @property
    def residual_by(self) -> Callable[[View], Tensor]:
        """The function that computes the residual of a step."""
        return next((term.residual for term in self.terms if term.residual is not None), residual_of)

    def with_terms(self, *terms: Term) -> Assembly:
        """A copy with more terms; names must be new."""
        names = [term.name for term in (*self.terms, *terms)]
        if len(set(names)) < len(names):
            raise ValueError(f"expected terms with distinct names, found {names}")
        return replace(self, terms=(*self.terms, *terms))

    def replacing(self, term: Term) -> Assembly:
        """A copy in which this term replaces the one with its name, which must exist."""
        if term.name not in (names := [old.name for old in self.terms]):
            raise ValueError(f"expected a term named {term.name!r}, found {names}")
        return replace(self, terms=tuple(term if old.name == term.name else old for old in self.terms))

    def with_constraints(self, *constraints: Constraint) -> Assembly:
        return replace(self, constraints=(*self.constraints, *constraints))

    def with_knobs(self, **knobs: Schedule) -> Assembly:
        return replace(self, knobs={**self.knobs, **knobs})

    def with_extra(self, name: str, extra: Extra) -> Assembly:
        """A copy with a module that trains along, under a new name; terms find it as `view.sae.extras[name]`."""
        if name in self.extras:
            raise ValueError(f"expected a new name for an extra, found {name!r} again")
        return replace(self, extras={**self.extras, name: extra})

    def with_sae(self, sae: SparseAutoencoder) -> Assembly:
        """A copy with another module, say one that wraps this one's."""
        return replace(self, sae=sae)

    def cut_short(self, total_steps: int) -> list[tuple[int, int]]:
        """Schedule phases that a run of this length is too short for: the steps requested, and the steps given."""
        schedules = [self.rate, *(term.weight for term in self.terms), *self.knobs.values()]
        return sorted({found for schedule in schedules for found in cut_short(schedule, total_steps)})

    def knobs_at(self, step: int, total_steps: int) -> dict[str, float]:
        """Every knob's value at a step."""
        return {name: schedule(step, total_steps) for name, schedule in self.knobs.items()}


def require_splittable(name: str, assembly: Assembly) -> None:
    """Refuse an SAE if any of its parts needs all latents in one process."""
    sae, unsplit = assembly.sae, [term.name for term in assembly.terms if term.split is None]
    if type(sae) is not SparseAutoencoder or len(sae.extras) > 0 or not sae.gate.may_split or unsplit:
        why = f" (its loss {unsplit[0]} does)" if unsplit else ""
        raise ConfigInvalid(
            f"{name}: course.shard_width is for SAEs without parts that need all latents in one process{why}: "
            "leave it out, or train only its base if it has one"
        )


def split_parameters(sae: SparseAutoencoder) -> tuple[str, ...]:
    """The parameters with a row or a number for each latent."""
    of_gate = (f"gate.{name}" for name, own in sae.gate.named_parameters() if own.shape == (sae.num_latents,))
    return ("W_enc", "b_enc", "W_dec", *of_gate)


def split_state(parameters: Iterable[str]) -> set[str]:
    """The tensors of a trainee's state with a row or a number for each latent, given its parameters that have one."""
    found = {"latents.tokens_since_fired", "latents.listed"}
    for name in parameters:
        found |= {f"sae.{name}", f"adam.{name}.first_moment", f"adam.{name}.second_moment"}
    return found


def keep_own_latents(sae: SparseAutoencoder, parameters: Iterable[str], latents: Latents) -> None:
    """Cut the parameters to the latents of this process."""
    for name in parameters:
        module, _, own = name.rpartition(".")
        setattr(sae.get_submodule(module), own, nn.Parameter(latents.own(sae.get_parameter(name).detach()).clone()))
