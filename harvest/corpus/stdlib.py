"""A corpus that every machine has: the text of the running Python's standard library."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any

from .source import SMALL_TOKENS, STDLIB, Source, State


class StdlibCorpus:
    """The text of the running Python's standard library: every machine has it."""

    id = STDLIB
    settings: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    def __init__(self) -> None:
        self._read = 0

    @cached_property
    def _documents(self) -> list[tuple[str, str]]:
        from ..pocket.text import stdlib_documents

        return list(stdlib_documents())

    @property
    def revision(self) -> str:
        from ..pocket.text import text_digest

        return f"sha256:{text_digest(self._documents)}"

    def documents(self, state: State | None = None) -> Iterator[str]:
        self._read = (state or {}).get("documents", 0)
        for _, text in islice(self._documents, self._read, None):
            self._read += 1
            yield text

    def state(self) -> State:
        return {"documents": self._read}


SOURCE = Source(
    help=STDLIB,
    takes=lambda options: options.dataset == STDLIB,
    open=lambda _: StdlibCorpus(),
    heeds=(),
    tokens=SMALL_TOKENS,
)
