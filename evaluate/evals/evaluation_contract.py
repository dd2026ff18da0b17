"""The contract of an evaluation: what its file defines, what it receives, and what it returns.

A file `evals/NAME.py` is the evaluation NAME; so is a folder `evals/NAME/` with a file `evaluation.py`. It ends with

    EVALUATION = Evaluation(Config, evaluate, needs=Needs(store=True), summary=("group.metric",))

and nothing else needs editing: the command, `--set NAME.key=value`, `--resume`, `--compare` and the tests find it by
name. Every metric has a row in MEASURES.md, and the evaluation a line in the table of docs/evaluate.md; tests require
both.

There are four ways to report that a number is missing:
    raise NotRun            the model, the data or the store is missing: none of the remaining SAEs can be evaluated
    yield Failure(sae, e)   this SAE cannot be evaluated, others can: `not run` for a NotRun error, else `failed`
    Result(missing="...")   some numbers need something that is not there yet (the model): `--resume` tries again
    Result(remark="...")    some numbers do not exist for this SAE: the result is complete
A remark also warns where a number says less than it seems to, such as a mean over only some of the parts.
A single number that does not exist, such as a mean over nothing, is NaN. JSON has no NaN: it is written as -1 among
metrics, details and `unstructured`, as in SAEBench (tables read -1 as no number), and as null in `extra`. If it is in
the summary and the result does not explain it, a remark that names it is added.

`measured_on` states in a short line what a result was measured on: the split, tokens and windows of the store
(`TextCount` of context/stored_windows.py counts them), the name and size of other data, or weights alone.

Tokens that count are neither special nor padding, nor massive in what the SAE reads or writes: `ordinary_rows` of
context/stored_windows.py finds them, `sums_of_codes` sums over them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Generic, TypeVar

from ...cache_schema.numbers_in_words import counted
from ..context.context import Context
from ..context.evaluation_data_sets import Revision
from ..context.loaded_sae import LoadedSae
from ..context.write_and_read_results import Failure, Result
from ..errors import EvaluationInvalid, SettingInvalid

__all__ = ["Context", "Evaluation", "Failure", "LoadedSae", "Needs", "Result", "beyond", "remark_of"]

C = TypeVar("C")


@dataclass(frozen=True)
class Needs:
    """What an evaluation needs before it starts."""

    model: bool = False
    store: bool = False
    tokens_only: bool = False
    """It reads only tokens from the store, no activations."""
    from_tokens: bool = False
    """It can compute residuals from the store's tokens instead of reading them (--from-tokens)."""
    residuals: bool = True
    """It is only for SAEs on the residual stream; others are not run."""

    def require(self, context: Context) -> None:
        """Raise the NotRun error that names the first thing missing."""
        if self.store:
            _ = context.store
        if self.model:
            context.require_model()


@dataclass(frozen=True)
class Evaluation(Generic[C]):
    """One evaluation, as its file declares it."""

    config: type[C]
    """A frozen dataclass of settings that JSON can hold, each with a default: together with the store and the
    model's dtype they determine every number. Only a field `cache`, which names a folder, affects none."""
    evaluate: Callable[[Context, Sequence[LoadedSae], C], Iterator[Result | Failure]]
    """Called with all SAEs at once, so that the model runs once for all of them; yields one Result or Failure for each,
    with numbers that do not depend on the others. `Result.metrics` is two levels deep, group and metric."""
    needs: Needs = Needs()
    summary: tuple[str, ...] = ()
    """Metrics to show in the console's table and on a run's page, by dotted path: `group.metric`, or a path into
    `Result.extra`."""
    intervals: str | None = None
    """Path into `Result.extra` of 95 % intervals [low, high], keyed by the last name of a metric; those of `summary`
    are shown."""
    least: Mapping[str, int] = field(default_factory=dict)
    """The lowest value allowed for a numeric setting, or for each in a list; checked before anything is read."""
    is_there: Callable[[LoadedSae], bool] = lambda _: True
    """Whether the files it writes besides its result still exist: if not, `--resume` runs it again."""
    revision: int = 1
    """Increased when the same settings give different numbers: `--resume` keeps no result of an earlier revision."""
    data_revision: Callable[[Context, C], Revision | None] = lambda _context, _config: None
    """Identifies the text it measures on, if neither settings nor store do: `--resume` keeps no result on other text.
    For data sets on the hub, the commit of each. None if there is nothing to identify, or it is unknown."""

    def __post_init__(self) -> None:
        settings: Any = self.config
        is_frozen = is_dataclass(settings) and settings.__dataclass_params__.frozen  # type: ignore[attr-defined]
        if not is_frozen or any(f.default is MISSING and f.default_factory is MISSING for f in fields(settings)):
            raise EvaluationInvalid(f"{settings.__module__}: expected Config to be a frozen dataclass with defaults")
        wrong = [metric for metric in self.summary if not re.fullmatch(r"\w+(\.\w+)+", metric)]
        if wrong:
            raise EvaluationInvalid(
                f"{settings.__module__}: expected a summary of paths like group.metric, found {wrong}"
            )

    def require(self, config: C) -> None:
        """Refuse settings below `least`; None is always accepted."""
        for name, bound in self.least.items():
            given = getattr(config, name)
            for value in given if isinstance(given, tuple) else (given,):
                if value is not None and value < bound:
                    raise SettingInvalid(f"{name}: expected {bound} or more, found {value}")


def remark_of(*parts: str | None) -> str | None:
    """Join the parts of a remark; None if all are empty."""
    return "; ".join(filter(None, parts)) or None


def beyond(name: str, asked: Iterable[int], there: int, noun: str = "latent", whose: str = "the SAE") -> str | None:
    """A remark on the values of a setting that ask for more than there is: for these, all of it was used."""
    more = ", ".join(str(number) for number in asked if number > there)
    return f"{name} {more}: {whose} has {counted(there, noun)}" if more else None
