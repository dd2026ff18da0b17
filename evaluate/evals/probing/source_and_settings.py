"""Where probing data come from, and the settings of evaluations on them: which texts, and how probes are trained.

Data come from the hub, under their real names, or from this Python's library. `auto` means the hub, except for the
pocket model, which knows only Python's library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from ....cache_schema.numbers_in_words import counted
from ...context.context import Context
from ...context.evaluation_data_sets import Revision
from ...errors import DataMissing
from . import saebench_texts, stdlib_texts
from .draw_classes import Table, Task
from .fit_probes import Training

T = TypeVar("T")
S = TypeVar("S", bound="DataSettings")
DataName = Literal["auto", "hub", "stdlib"]
LEAST = {"train_set_size": 4, "test_set_size": 4, "context_length": 2}
"""Room for a text of each class with each value of the other label, and for a token after BOS."""


@dataclass(frozen=True)
class Pairs:
    """What spurious-correlation removal confounds: pairs of values of column 1, and the two of column 2."""

    column1: tuple[dict[str, object], ...]
    """Two values each, by name."""
    column2: tuple[object, object]


@dataclass(frozen=True)
class Source:
    """Probing data of one kind, and the sizes that suit it."""

    name: Literal["hub", "stdlib"]
    probing: tuple[str, ...]
    pairs: dict[str, Pairs]
    """For the data sets of scr and tpp."""
    load_task: Callable[[str, int, int, int], Task]
    load_table: Callable[[str, bool], Table]
    train_size: int
    test_size: int
    context: int
    revision: Callable[[Sequence[str]], Revision | None]

    def settings(self, revision: Revision | None) -> dict[str, Any]:
        """Our own entries in a result's settings: which data, and the precision of the SAEs."""
        return {"data": self.name, "data_revision": revision, "sae_dtype": "float32"}

    def describe(self, tasks: Sequence[Task]) -> str:
        """How much text was used; a task's texts count once, however often they are drawn."""
        texts = [{text for part in (one.train, one.test) for each in part.values() for text in each} for one in tasks]
        classes = sum(len(one.train) for one in tasks)
        return f"{self.name} texts, {sum(map(len, texts)):,} of {classes} classes in {counted(len(tasks), 'task')}"

    def default_names(self, settings: DataChoice) -> tuple[str, ...]:
        """The data sets of an evaluation whose settings name none."""
        return tuple(self.pairs) if isinstance(settings, Settings) else self.probing


HUB = Source(
    name="hub",
    probing=saebench_texts.NAMES,
    pairs={
        f"{saebench_texts.BIOS}_class_set1": Pairs(
            (
                {"professor": 21, "nurse": 13},
                {"architect": 1, "journalist": 11},
                {"surgeon": 25, "psychologist": 22},
                {"attorney": 2, "teacher": 26},
            ),
            (0, 1),  # male, female
        ),
        saebench_texts.AMAZON: Pairs(
            (
                {"Books": 24, "CDs_and_Vinyl": 26},
                {"Software": 30, "Electronics": 6},
                {"Pet_Supplies": 18, "Office_Products": 11},
                {"Industrial_and_Scientific": 3, "Toys_and_Games": 1},
            ),
            (1.0, 5.0),
        ),
    },
    load_task=saebench_texts.load_task,
    load_table=saebench_texts.load_table,
    train_size=4000,
    test_size=1000,
    context=128,
    revision=saebench_texts.revision,
)

STDLIB = Source(
    name="stdlib",
    probing=stdlib_texts.NAMES,
    pairs={
        stdlib_texts.LIBRARY: Pairs(
            ({"asyncio": "asyncio", "email": "email"}, {"email": "email", "xml": "xml"}), stdlib_texts.KINDS
        )
    },
    load_task=stdlib_texts.load_task,
    load_table=lambda _name, is_test: stdlib_texts.load_table(is_test),
    train_size=320,
    test_size=160,
    context=48,
    revision=lambda _: stdlib_texts.revision(),
)


def find_source(context: Context, wanted: DataName) -> Source:
    return STDLIB if context.takes_library(wanted) else HUB


@dataclass(frozen=True)
class DataChoice:
    """Settings of every evaluation on labelled texts."""

    data: DataName = "auto"
    random_seed: int = 42
    dataset_names: tuple[str, ...] = ()
    """Empty: all of the source's data sets."""
    llm_batch_size: int = 32


@dataclass(frozen=True)
class DataSettings(DataChoice):
    train_set_size: int | None = None
    """Rows of one probe, half of them the class; None: 4000 for data of the hub, 320 for this Python's text."""
    test_set_size: int | None = None
    """The same for tests; None: 1000 and 160."""
    context_length: int | None = None
    """None: 128 tokens for data of the hub, 48 for this Python's text."""

    @property
    def sizes(self) -> tuple[int, int]:
        assert self.train_set_size is not None and self.test_set_size is not None, "filled in first"
        return self.train_set_size, self.test_set_size


@dataclass(frozen=True)
class Settings(DataSettings):
    """The settings of scr and tpp; the defaults are SAEBench's."""

    probe_train_batch_size: int = 16
    """Affects how much of a spurious correlation a probe learns: results with different values do not compare."""
    probe_epochs: int = 20
    probe_lr: float = 1e-3
    probe_l1_penalty: float = 1e-3
    early_stopping_patience: int = 20
    n_values: tuple[int, ...] = (2, 5, 10, 20, 50, 100, 500)

    @property
    def training(self) -> Training:
        return Training(
            self.probe_train_batch_size,
            self.probe_epochs,
            self.probe_lr,
            self.early_stopping_patience,
            self.probe_l1_penalty,
        )


def filled(settings: S, source: Source, most: int | None = None) -> S:
    """The settings, completed with the source's defaults; those of sizes are at most `most`."""
    train_size, test_size = (min(size, most or size) for size in (source.train_size, source.test_size))
    return replace(
        settings,
        data=source.name,
        dataset_names=settings.dataset_names or source.default_names(settings),
        train_set_size=settings.train_set_size or train_size,
        test_set_size=settings.test_set_size or test_size,
        context_length=settings.context_length or source.context,
    )


def data_revision(context: Context, settings: DataChoice) -> Revision | None:
    """The revision of the data that the settings choose, as an evaluation's `data_revision`."""
    source = find_source(context, settings.data)
    return source.revision(settings.dataset_names or source.default_names(settings))


def load_all(names: Sequence[str], load: Callable[[str], Iterable[T]]) -> tuple[list[T], str | None]:
    """The data sets that can be loaded, and why the others cannot. Raises DataMissing if none can."""
    found: list[T] = []
    reasons: list[str] = []
    for name in names:
        try:
            found += load(name)
        except DataMissing as reason:
            reasons.append(str(reason))
    if not found:
        raise DataMissing(reasons[0])
    return found, "; ".join(reasons) or None
