"""Where probing data come from: the hub, by their real names, or text of this Python's library.

`auto` takes the hub's, except for the pocket model, which knows only Python's library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from ....cache_schema.numbers_in_words import counted
from ...context.context import Context
from ...context.evaluation_data_sets import Revision
from ...errors import DataMissing
from . import saebench_texts, stdlib_snippets, stdlib_tasks
from .draw_classes import Table, Task

T = TypeVar("T")
DataName = Literal["auto", "hub", "stdlib"]


@dataclass(frozen=True)
class Pairs:
    """What spurious-correlation removal confounds: pairs of values of column 1, and the two of column 2."""

    column1: tuple[tuple[str, str], ...]
    column2: tuple[object, object]
    values: dict[str, object]
    """What stands in column 1 for each name."""


@dataclass(frozen=True)
class Source:
    """Probing data of one kind, and the sizes that suit it."""

    name: Literal["hub", "stdlib"]
    probing: tuple[str, ...]
    perturbed: tuple[str, ...]
    """The data sets of scr and tpp."""
    pairs: dict[str, Pairs]
    load_task: Callable[[str, int, int, int], Task]
    load_table: Callable[[str, bool], Table]
    train_size: int
    test_size: int
    context: int
    revision: Callable[[Sequence[str]], Revision | None]
    """The revision of some data sets."""

    def pairs_of(self, name: str) -> Pairs:
        if name not in self.pairs:
            raise DataMissing(f"{name} has no two labels to confound: choose from {', '.join(self.pairs)}")
        return self.pairs[name]


_BIOS, _AMAZON = f"{saebench_texts.BIOS}_class_set1", saebench_texts.AMAZON

HUB = Source(
    name="hub",
    probing=saebench_texts.NAMES,
    perturbed=(_BIOS, _AMAZON),
    pairs={
        _BIOS: Pairs(
            (("professor", "nurse"), ("architect", "journalist"), ("surgeon", "psychologist"), ("attorney", "teacher")),
            (0, 1),  # male, female
            {
                "architect": 1,
                "attorney": 2,
                "journalist": 11,
                "nurse": 13,
                "professor": 21,
                "psychologist": 22,
                "surgeon": 25,
                "teacher": 26,
            },
        ),
        _AMAZON: Pairs(
            (
                ("Books", "CDs_and_Vinyl"),
                ("Software", "Electronics"),
                ("Pet_Supplies", "Office_Products"),
                ("Industrial_and_Scientific", "Toys_and_Games"),
            ),
            (1.0, 5.0),
            {
                "Books": 24,
                "CDs_and_Vinyl": 26,
                "Electronics": 6,
                "Industrial_and_Scientific": 3,
                "Office_Products": 11,
                "Pet_Supplies": 18,
                "Software": 30,
                "Toys_and_Games": 1,
            },
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
    probing=stdlib_tasks.NAMES,
    perturbed=(stdlib_tasks.LIBRARY,),
    pairs={
        stdlib_tasks.LIBRARY: Pairs(
            (("asyncio", "email"), ("email", "xml")),
            stdlib_snippets.KINDS,
            {name: name for name in stdlib_snippets.LIBRARIES},
        )
    },
    load_task=stdlib_tasks.load_task,
    load_table=lambda _name, is_test: stdlib_tasks.load_table(is_test),
    train_size=320,
    test_size=160,
    context=48,
    revision=lambda _: stdlib_snippets.revision(),
)


def find_source(context: Context, wanted: DataName) -> Source:
    """The data that a setting means."""
    return STDLIB if context.takes_library(wanted) else HUB


@dataclass(frozen=True)
class DataChoice:
    """Settings of every evaluation on labelled texts."""

    data: DataName = "auto"
    random_seed: int = 42
    dataset_names: tuple[str, ...] = ()
    """Empty: all data sets of the source."""
    llm_batch_size: int = 32


def data_revision(context: Context, settings: DataChoice) -> Revision | None:
    """The revision of the data that the settings mean, as an evaluation's `data_revision`."""
    source = find_source(context, settings.data)
    return source.revision(settings.dataset_names or source.probing)


def revision_of_perturbed(context: Context, settings: DataChoice) -> Revision | None:
    """The same for scr and tpp."""
    source = find_source(context, settings.data)
    return source.revision(settings.dataset_names or source.perturbed)


def said_of(source: Source, tasks: Sequence[Task]) -> str:
    """How much text was used, in words; a task's texts count once, however often they are drawn."""
    texts = [{text for part in (task.train, task.test) for each in part.values() for text in each} for task in tasks]
    classes = sum(len(task.train) for task in tasks)
    return f"{source.name} texts, {sum(map(len, texts)):,} of {classes} classes in {counted(len(tasks), 'task')}"


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
        raise DataMissing(reasons[0] if reasons else "no data set was named: leave dataset_names empty for all")
    return found, "; ".join(reasons) or None
