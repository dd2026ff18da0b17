"""The contract of a corpus source: its file, the corpus that it opens, and the user's options.

A file `harvest/corpus/NAME.py` is the source NAME. It ends with

    SOURCE = Source(help="...", takes=takes, open=open_it)

and nothing else is edited: `--dataset` and its help, the plan, the manifest and the tests find it by its file.
Importing it must be quick: slow imports belong in `open`.
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
COMPANIONS = {  # fields that a source may use, and the options, given with --dataset, that set them
    "config": "--dataset-config",
    "split": "--dataset-split",
    "revision": "--dataset-revision",
    "column": "--column",
}


@dataclass(frozen=True)
class DatasetOptions:
    """The user's options for the text: --dataset and its companions."""

    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"

    @property
    def given(self) -> dict[str, str]:
        """The companions of --dataset that differ from their defaults, by field, as the user types them."""
        defaults = {field.name: field.default for field in fields(self) if field.name in COMPANIONS}
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        return {name: f"{COMPANIONS[name]} {getattr(self, name)}" for name in changed}


class Corpus(Protocol):
    """Documents in a fixed order, which can be read from any point on.

    `id`, `revision` and `settings` decide the text and contain no paths of this machine: they go into the manifest and
    the cache id, so two corpora that agree in them have the same documents. Three attributes are optional: `part`, if
    only a part of the text named by the id can be read, which stores record; `to_hash`, a message to show if computing
    `revision` takes long; `left_alone`, a report of skipped files that may hold text, read before the documents and
    again after them, when it may have grown.
    """

    @property
    def id(self) -> str: ...
    @property
    def revision(self) -> str:
        """A commit, or a hash of the text."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Everything else that decides the text, as plain JSON."""
        ...

    def documents(self, state: State | None = None) -> Iterator[str]:
        """All documents, or those after the one at which `state` was taken: the same ones each time.

        Each goes through `checked_text`. Unreadable text raises a HarvestError with its place and the remedy; a lost
        connection raises NetworkLost, after which `state()` still counts every document that was yielded.
        """
        ...

    def state(self) -> State:
        """The position that the last call of `documents` has reached."""
        ...


class InOrder:
    """Base of a corpus that can skip texts quickly: its state is the number of documents yielded."""

    _read = 0
    _before = 0  # documents that come before the first of `_texts`

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
    """The values of --dataset for this source, as listed by `sae-harvest --help`."""
    takes: Callable[[DatasetOptions], bool]
    """Whether the user means this source, without the network; also for a bad name that only it can explain."""
    open: Callable[[DatasetOptions], Corpus]
    """Open the corpus; if there is none, raise CorpusUnavailable with the remedy."""
    rank: int = 0
    """Sources are tried by rank: 0 for fixed names and prefixes, 1 for paths, 2 for everything else."""
    tokens: int | None = None
    """The default number of tokens; None: a default that suits the model."""
    heeds: tuple[str, ...] = tuple(COMPANIONS)
    """The companions of --dataset that it uses; the others are refused if given."""
    pinned: Callable[[DatasetOptions], dict[str, Any]] | None = None
    """For a remote corpus: its `settings` without the network, so that a store can resume while it is unreachable."""
    open_again: Callable[[DatasetOptions, State], Corpus | None] = lambda *_: None
    """For a remote corpus: the text that a state was taken from, whatever its name refers to now; None if the user asks
    for another text, or the state is empty."""


def part_of(corpus: Corpus) -> str | None:
    """The part of the text named by the corpus's id that can be read; None: all of it."""
    return getattr(corpus, "part", None)


def revision_of(corpus: Corpus, say: Callable[[str], None]) -> str:
    """The corpus's revision, with a message to `say` first if computing it takes long."""
    if to_hash := getattr(corpus, "to_hash", ""):
        say(to_hash)
    return corpus.revision


def left_alone_by(corpus: Corpus) -> str:
    """In words: files that a corpus skips or may read unintentionally, and the remedy; may be empty."""
    return getattr(corpus, "left_alone", "")


def names_under(folder: Path) -> tuple[list[Path], str]:
    """All names under a folder except folders, in no order; and, in words, the folders that were not entered: links,
    which may form cycles, and those that the user may not open."""
    names: list[Path] = []
    skipped: list[str] = []

    def skip(error: OSError) -> None:
        if not isinstance(error, PermissionError):  # such as a lost disk: half a folder would be another text
            raise error
        skipped.append(error.filename)

    for place, folders, files in os.walk(folder, onerror=skip):
        names += (Path(place, name) for name in files)
        skipped += (path for name in folders if os.path.islink(path := os.path.join(place, name)))
    if not skipped:
        return names, ""
    count = f"{counted(len(skipped), 'folder')} not entered (links, or without permission)"
    return names, f"{count}: {some_of(sorted(skipped))}. To have one read: put a copy in its place"


def checked_text(value: object, where: str) -> str:
    """Require a document that can be encoded as UTF-8."""
    if not isinstance(value, str):
        raise DocumentInvalid(
            f"{where}: expected text, found {type(value).__name__}. Remove it, or name another --column"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DocumentInvalid(
            f"{where}: {value[error.start]!r} at character {error.start} is an unpaired surrogate, which UTF-8 cannot "
            "encode. Correct or remove this document, then run again"
        ) from None
    return value


def cell_text(value: object, where: str) -> str:
    """`checked_text` for a cell of a column. A null is an empty document: no text is lost, and readers cannot correct a
    data set on the hub. The number of empty documents is reported after tokenising."""
    return "" if value is None else checked_text(value, where)
