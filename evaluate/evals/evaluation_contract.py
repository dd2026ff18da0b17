"""The contract of an evaluation: what its file defines, what it is given, and what it gives back.

A file `evals/NAME.py` is the evaluation NAME; so is a folder `evals/NAME/` with a file `evaluation.py`. It ends with

    EVALUATION = Evaluation(Config, evaluate, needs=Needs(store=True), summary=("group.metric",))

and nothing else is edited: the command, `--set NAME.key=value`, `--resume`, `--compare` and the tests find it by its
name. Every metric has a row in MEASURES.md and the evaluation a line in the table of docs/evaluate.md; a test asks for
both.

There are four ways of having no number:
    raise NotRun            the model, the data or the store is missing: no SAE that is left can be evaluated
    yield Failure(sae, e)   this SAE cannot be evaluated, others can: `not run` for a NotRun error, else `failed`
    Result(missing="...")   some numbers are absent until something is there (the model): `--resume` tries again
    Result(remark="...")    some numbers are absent because this SAE cannot have them: the result is complete
A remark also says where a number says less than it seems, such as a mean over fewer parts than there are.
A single number that does not exist, such as a mean over nothing, is NaN. JSON has none: it is written as -1 among
metrics, details and `unstructured`, as SAEBench does (tables take -1 for no number), and as null in `extra`. If it is
of the summary and the result says nothing, a remark is added that names it.

Every result says what it was measured on (`measured_on`), in a short line: the split, tokens and windows of the store
(`TextCount` of context/stored_windows.py counts them), the name and size of other data, or that it is of weights alone.

Tokens that count are neither special nor padding, nor massive in what the SAE reads or writes: `ordinary_rows` of
context/stored_windows.py says which, `sums_of_codes` adds up over them.
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
    """What must be there before an evaluation starts."""

    model: bool = False
    store: bool = False
    tokens_only: bool = False
    """It reads only tokens from the store, no activations."""
    from_tokens: bool = False
    """It can compute residuals from the store's tokens in place of reading them (--from-tokens)."""
    residuals: bool = True
    """It is for SAEs on the residual stream; others are not run. False if only weights are read."""

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
    model's dtype they decide every number. A field `cache` names a folder and decides none."""
    evaluate: Callable[[Context, Sequence[LoadedSae], C], Iterator[Result | Failure]]
    """Called with all SAEs at once, so that the model runs once for all of them; yields one Result or Failure for each,
    with numbers that do not depend on the others. `Result.metrics` is two levels deep, group and metric."""
    needs: Needs = Needs()
    summary: tuple[str, ...] = ()
    """Metrics for the tables of the console and of a run's page by dotted path: `group.metric`, or one into
    `Result.extra`."""
    intervals: str | None = None
    """Path into `Result.extra` of 95 % intervals [low, high], by the last name of a metric; those of `summary` are
    shown."""
    least: Mapping[str, int] = field(default_factory=dict)
    """The least value of a numeric setting, and of each in a list: less is refused before anything is read."""
    is_there: Callable[[LoadedSae], bool] = lambda _: True
    """Whether what it writes besides its result still exists: if not, `--resume` runs it again."""
    revision: int = 1
    """Raised when the same settings give other numbers than before: `--resume` keeps no result of an earlier one."""
    data_revision: Callable[[Context, C], Revision | None] = lambda _context, _config: None
    """Names the text that it measures on, if neither settings nor store do: `--resume` keeps no result of other text.
    For data sets on the hub, the commit of each. None if there is nothing to name, or it is unknown."""

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
        """Refuse settings below the least that makes sense; None is always accepted."""
        for name, bound in self.least.items():
            given = getattr(config, name)
            for value in given if isinstance(given, tuple) else (given,):
                if value is not None and value < bound:
                    raise SettingInvalid(f"{name}: expected {bound} or more, found {value}")


def remark_of(*said: str | None) -> str | None:
    """A result's remark, of all that there is to say."""
    return "; ".join(filter(None, said)) or None


def beyond(name: str, asked: Iterable[int], there: int, noun: str = "latent", whose: str = "the SAE") -> str | None:
    """What a remark says of settings that ask for more than there is: all of it was taken."""
    more = ", ".join(str(number) for number in asked if number > there)
    return f"{name} {more}: {whose} has {counted(there, noun)}" if more else None
