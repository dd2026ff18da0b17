"""A corpus that every machine has: the text of the running Python's standard library."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from .source import SMALL_TOKENS, STDLIB, InOrder, Source


class StdlibCorpus(InOrder):
    """The text of the running Python's standard library: every machine has it."""

    id = STDLIB
    settings: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    @cached_property
    def _documents(self) -> list[tuple[str, str]]:
        from ..pocket.text import stdlib_documents

        return list(stdlib_documents())

    @property
    def revision(self) -> str:
        from ..pocket.text import text_digest

        return f"sha256:{text_digest(self._documents)}"

    def _texts(self) -> Iterator[str]:
        return (text for _, text in self._documents)


SOURCE = Source(
    help=STDLIB,
    takes=lambda options: options.dataset == STDLIB,
    open=lambda _: StdlibCorpus(),
    heeds=(),
    tokens=SMALL_TOKENS,
)
