"""What a person sees of a harvest: tokens a second, time left, bytes written, disk still free."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..cache_schema.commits import CommitRecord
from ..cache_schema.files import Files

LOG_SECONDS = 30.0


class Watch:
    """Shows how far a harvest is: a live bar on a terminal, a line now and then in a log."""

    def __init__(self, console: Console | None = None, is_quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=is_quiet, highlight=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._logged = self._began = time.monotonic()
        self._total = self._done = 0
        self._before: int | None = None  # what earlier runs had done; None until the stage is first reported on
        self._bytes = 0

    def say(self, lines: str | Sequence[str]) -> None:
        for line in [lines] if isinstance(lines, str) else lines:
            self.console.print(line, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, total_tokens: int) -> Iterator[None]:
        """One part of the work, measured in tokens."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._total, self._done, self._bytes, self._before = total_tokens, 0, 0, None
        self._began = self._logged = time.monotonic()
        is_live = self.console.is_terminal and not self.console.quiet
        with Progress(*columns, console=self.console, disable=not is_live) as bar:
            self._bar, self._task = bar, bar.add_task(title, total=total_tokens, facts="")
            yield
        self._bar = None

    def packed(self, tokens: int, documents: int) -> None:
        """So many tokens are packed by now. What the first report says of a stage was done by earlier runs."""
        self._before = tokens if self._before is None else self._before
        self._done = tokens
        self._show(f"{documents:,} documents")

    def committed(self, record: CommitRecord, context: int, files: Files) -> None:
        """One more shard is committed."""
        start, stop = record.windows
        self._done += (stop - start) * context
        self._bytes += sum(array.bytes for array in record.arrays.values())
        free = files.free_bytes()
        disk = "" if free is None else f", {free / 1e9:,.1f} GB free"
        self._show(f"{self._bytes / 1e9:,.2f} GB written{disk}")

    def _show(self, facts: str) -> None:
        rate = (self._done - (self._before or 0)) / max(time.monotonic() - self._began, 1e-9)
        facts = f"{self._done:,} of {self._total:,} tokens, {rate:,.0f}/s, {facts}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, facts=facts)
        if not self.console.is_terminal and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            left = (self._total - self._done) / max(rate, 1e-9)
            self.say(f"{facts}, {left / 60:,.1f} minutes left")
