"""The contract of a corpus source: what its file defines, what a corpus is, and which options a user gives.

A file `harvest/corpus/NAME.py` is the source NAME. It ends with

    SOURCE = Source(help="...", takes=takes, open=open_it)

and nothing else is edited: `--dataset` and its help, the plan, the manifest and the tests find it by its file.
Importing it must be quick: what takes seconds to import is imported by `open`.
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
SMALL_TOKENS = 600_000  # a minute or so of the pocket model on two cores
OPENWEBTEXT = "Skylion007/openwebtext"
BESIDE = {  # given with --dataset: what a source may use, and the option's name
    "config": "--dataset-config",
    "split": "--dataset-split",
    "revision": "--dataset-revision",
    "column": "--column",
}


@dataclass(frozen=True)
class DatasetOptions:
    """The user's options for the text: --dataset and those that go with it."""

    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"

    @property
    def beside(self) -> dict[str, str]:
        """The options given with --dataset, by name, as the user types them."""
        said = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        return {name: f"{BESIDE[name]} {value}" for name, value in said.items() if name in BESIDE}


class Corpus(Protocol):
    """Documents in a fixed order, which can be read from any point on.

    `id`, `revision` and `settings` decide the text and name no path of this machine: they go into the manifest and
    the cache id, so two corpora that agree in them have the same documents. A corpus that can read only a part of what
    its id names gives it in `part`, and stores record that. One whose `revision` reads for long says so in `to_hash`.
    Files it skips that may hold text it reports in `left_alone`, which is read before its documents and again after
    them, when it may report more.
    """

    @property
    def id(self) -> str: ...
    @property
    def revision(self) -> str:
        """A commit, or a hash of the text."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Whatever else decides the text, as plain JSON."""
        ...

    def documents(self, state: State | None = None) -> Iterator[str]:
        """All documents, or those after the one at which `state` was taken: the same ones each time.

        Each goes through `checked_text`. What cannot be read is a HarvestError that says where and what to do; a
        lost connection is NetworkLost, after which `state()` still counts every document that was yielded.
        """
        ...

    def state(self) -> State:
        """The position that the last `documents` has reached."""
        ...


class InOrder:
    """Base of a corpus whose texts are quickly skipped: its state is the number of documents yielded."""

    _read = 0
    _before = 0  # documents before those of `_texts`, where that does not begin with the first

    def _texts(self) -> Iterator[str]:
        """All texts, in order."""
        raise NotImplementedError

    def documents(self, state: State | None = None) -> Iterator[str]:
        self._read = (state or {}).get("documents", 0)
        for text in islice(self._texts(), self._read - self._before, None):
            self._read += 1
            yield text

    def state(self) -> State:
        return {"documents": self._read}


@dataclass(frozen=True)
class Source:
    """One kind of corpus, as its file declares it."""

    help: str
    """The values of --dataset that mean this source: `sae-harvest --help` lists these texts."""
    takes: Callable[[DatasetOptions], bool]
    """Whether the user means this source; uses no network, and accepts a name that only this source could explain."""
    open: Callable[[DatasetOptions], Corpus]
    """Open the corpus; CorpusUnavailable, with what to do, if there is none."""
    rank: int = 0
    """Sources are tried by rank: 0 names of their own, 1 paths, 2 whatever no other takes."""
    tokens: int | None = None
    """The default number of tokens; None: what suits the model."""
    heeds: tuple[str, ...] = tuple(BESIDE)
    """Which of the options that go with --dataset it uses; the others are refused if given."""
    pinned: Callable[[DatasetOptions], dict[str, Any]] | None = None
    """For a remote corpus: its `settings` without the network, so that a store resumes while it is unreachable."""
    open_again: Callable[[DatasetOptions, State], Corpus | None] = lambda *_: None
    """For a remote corpus: the text that a state was taken from, whatever its name means by now; None if the user asks
    for another, or no state of it was kept."""


def part_of(corpus: Corpus) -> str | None:
    """The part that can be read of what the corpus's id names; None: all of it."""
    return getattr(corpus, "part", None)


def revision_of(corpus: Corpus, say: Callable[[str], None]) -> str:
    """The corpus's revision, with a message to `say` before it is read for long to find it."""
    if to_hash := getattr(corpus, "to_hash", ""):
        say(to_hash)
    return corpus.revision


def left_alone_by(corpus: Corpus) -> str:
    """In words: what a corpus skips that may hold text or reads unintentionally, and what to do; may be empty."""
    return getattr(corpus, "left_alone", "")


def names_under(folder: Path) -> tuple[list[Path], str]:
    """Everything under a folder that is not a folder, in no order; and, in words, which folders were not entered:
    links, which may lead in circles, and those that the user may not open."""
    names: list[Path] = []
    shut: list[str] = []

    def pass_over(error: OSError) -> None:
        if not isinstance(error, PermissionError):  # such as a lost disk: half a folder would be another text
            raise error
        shut.append(error.filename)

    for place, folders, files in os.walk(folder, onerror=pass_over):
        names += (Path(place, name) for name in files)
        shut += (path for name in folders if os.path.islink(path := os.path.join(place, name)))
    if not shut:
        return names, ""
    said = f"{counted(len(shut), 'folder')} not entered (links, or without permission)"
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
            "hold. Correct or remove this document, then run again"
        ) from None
    return value


def cell_text(value: object, where: str) -> str:
    """The same for a cell of a column. A null is an empty document: a row without text has none to lose, and a data set
    on the hub cannot be corrected by its reader. The number of empty ones is reported after tokenising."""
    return "" if value is None else checked_text(value, where)
