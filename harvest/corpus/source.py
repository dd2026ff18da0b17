"""The contract of a corpus source: what its file defines, what a corpus is, and what a user says about one.

A file `harvest/corpus/NAME.py` is the source NAME. It ends with

    SOURCE = Source(help="...", takes=takes, open=open_it)

and nothing else is edited: `--dataset` and its help, the plan, the manifest and the tests find it by its file.
Importing it is quick: what takes seconds to import is imported by `open`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ...cache_schema.numbers_in_words import counted, some_of
from ..errors import DocumentInvalid

State = dict[str, Any]  # plain JSON

STDLIB = "stdlib"
SMALL_TOKENS = 600_000  # a minute or so on two cores, of the pocket model
OPENWEBTEXT = "Skylion007/openwebtext"
BESIDE = {  # --dataset: what a source may heed, and what a user types
    "config": "--dataset-config",
    "split": "--dataset-split",
    "revision": "--dataset-revision",
    "column": "--column",
}


@dataclass(frozen=True)
class DatasetOptions:
    """What a user says about the text: --dataset and the options beside it."""

    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"

    @property
    def beside(self) -> dict[str, str]:
        """What is said beside --dataset, by name, as a user types it."""
        said = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        return {name: f"{BESIDE[name]} {value}" for name, value in said.items() if name in BESIDE}


class Corpus(Protocol):
    """Documents in a fixed order, which can be read from any point on.

    `id`, `revision` and `settings` decide the text and name no path of this machine: they go into the manifest and
    the cache id, so two corpora that agree in them have the same documents. One that can read only a part of what its
    id names says which in `part`; stores then say so too. What it passes over, though there may be text in it, it
    says in `left_alone`: asked for before its documents are read and again behind them, which may show more of it.
    """

    @property
    def id(self) -> str: ...
    @property
    def revision(self) -> str:
        """A commit, or a hash of the text."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What else decides the text, as plain JSON."""
        ...

    def documents(self, state: State | None = None) -> Iterator[str]:
        """All documents, or those behind the one at which `state` was taken: the same ones each time.

        Each goes through `checked_text`. What cannot be read is a HarvestError that says where and what to do; a
        lost connection is NetworkLost, after which `state()` still counts every document that was given.
        """
        ...

    def state(self) -> State:
        """Where the last `documents` has come to."""
        ...


class InOrder:
    """Part of a corpus whose texts are quickly passed over: where it stands is how many documents were given."""

    _read = 0

    def _texts(self) -> Iterator[str]:
        """All of them."""
        raise NotImplementedError

    def documents(self, state: State | None = None) -> Iterator[str]:
        self._read = (state or {}).get("documents", 0)
        for text in islice(self._texts(), self._read, None):
            self._read += 1
            yield text

    def state(self) -> State:
        return {"documents": self._read}


@dataclass(frozen=True)
class Source:
    """One kind of corpus, as its file declares it."""

    help: str
    """What --dataset may be to mean this source: the list in `sae-harvest --help` is made of these."""
    takes: Callable[[DatasetOptions], bool]
    """Whether a user means this source; asks no network, and says yes to a name that only it could explain."""
    open: Callable[[DatasetOptions], Corpus]
    """The corpus; CorpusUnavailable, with what to do, where there is none."""
    rank: int = 0
    """Sources are asked by rank: 0 names of their own, 1 paths, 2 whatever no other takes."""
    tokens: int | None = None
    """How many to take where the user does not say; None: what suits the model."""
    heeds: tuple[str, ...] = tuple(BESIDE)
    """Of what may be said beside --dataset; the rest is refused where a user says it."""
    pinned: Callable[[DatasetOptions], dict[str, Any]] | None = None
    """Of a remote corpus: its `settings` without asking for it, so that a store goes on while it is out of reach."""
    open_again: Callable[[DatasetOptions, State], Corpus | None] = lambda *_: None
    """Of a remote corpus: the text that a state was taken of, whatever its name means by now; None where the user asks
    for another, or no state of it was kept."""


def part_of(corpus: Corpus) -> str | None:
    """Of what the corpus's id names, the part that can be read; None: all of it."""
    return getattr(corpus, "part", None)


def left_alone_by(corpus: Corpus) -> str:
    """What a corpus passes over that may hold text, or reads though nobody may mean it, and what to do; or empty."""
    return getattr(corpus, "left_alone", "")


def names_under(folder: Path) -> tuple[list[Path], str]:
    """All that lies under a folder and is no folder, in no order; and, for a person, which folders were not entered:
    links, which may lead in circles, and those that the user may not open."""
    names: list[Path] = []
    shut: list[str] = []

    def pass_over(error: OSError) -> None:
        if not isinstance(error, PermissionError):  # as of a disk that is lost: half a folder is another text
            raise error
        shut.append(error.filename)

    for place, folders, files in os.walk(folder, onerror=pass_over):
        names += (Path(place, name) for name in files)
        shut += (path for name in folders if os.path.islink(path := os.path.join(place, name)))
    if not shut:
        return names, ""
    said = f"{counted(len(shut), 'folder')} not entered (a link, or not yours to open)"
    return names, f"{said}: {some_of(sorted(shut))}. To have one read: put a copy in its place"


def checked_text(value: object, where: str) -> str:
    """A document that can be written as UTF-8, or an error that says which one cannot."""
    if not isinstance(value, str):
        raise DocumentInvalid(
            f"{where}: expected text, found {type(value).__name__}. Remove it, or name another --column"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DocumentInvalid(
            f"{where}: {value[error.start]!r} at character {error.start} is an unpaired surrogate, which UTF-8 cannot "
            "hold. Mend or remove this document, then run again"
        ) from None
    return value


def cell_text(value: object, where: str) -> str:
    """The same of a column that is there. A null is an empty document: a row without text has none to lose, and who
    reads a data set from the hub cannot mend it. How many are empty is told once they are tokenised."""
    return "" if value is None else checked_text(value, where)
