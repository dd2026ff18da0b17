"""What a corpus is, what a user says about one, and what holds of its text.

A corpus has an identity that decides its text and names no path, and it can be read from any point on:
`documents(state)` goes on behind the document at which `state()` was taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import DocumentInvalid

State = dict[str, Any]  # plain JSON

STDLIB = "stdlib"
OPENWEBTEXT = "Skylion007/openwebtext"


@dataclass(frozen=True)
class CorpusSource:
    """What a user says about the text."""

    dataset: str  # `stdlib`, a file or folder, or an id on the hub
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"

    @property
    def hub_settings(self) -> dict[str, Any]:
        """What else decides the text of a data set on the hub, its id and commit apart."""
        return {"config": self.config, "split": self.split, "column": self.column}


class Corpus(Protocol):
    """Documents in a fixed order."""

    @property
    def id(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def settings(self) -> dict[str, Any]:
        """What else decides the text."""
        ...

    def documents(self, state: State | None = None) -> Iterator[str]: ...
    def state(self) -> State:
        """Where the last `documents` has come to."""
        ...


def looks_like_path(dataset: str) -> bool:
    """Whether a name that is no file here can only have been meant as one."""
    return dataset.startswith((".", "/", "~")) or dataset.count("/") > 1 or Path(dataset).suffix in FILE_SUFFIXES


TEXT_SUFFIXES = (".txt", ".md", ".text")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
FILE_SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, *PARQUET_SUFFIXES)


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
            f"{where}: {value[error.start]!r} at character {error.start} is half of a pair that no UTF-8 can hold. "
            "Mend or remove this document, then run again"
        ) from None
    return value
