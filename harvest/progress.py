"""The progress of a harvest or an evaluation: a live bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..cache_schema.cli import open_console, while_shown
from ..cache_schema.numbers_in_words import say_time

LOG_SECONDS = 30.0
WIDE = 110  # columns; with fewer there is no room for a bar and the elapsed time
NARROW_COLUMNS = len("  66%  left 0:00:00")  # all but the title and the facts
WIDE_COLUMNS = NARROW_COLUMNS + len(" " * 20 + " 0:00:00 ")


class Stage:
    """One part of the work: its progress, its rate and the time left."""

    def __init__(self, watch: Watch, bar: Progress, title: str, total: int, unit: str) -> None:
        self._watch, self._bar, self._title, self._total, self._unit = watch, bar, title, total, unit
        self._task = bar.add_task(title, total=total, facts="")
        self._room = watch.console.width - cell_len(title) - (WIDE_COLUMNS if watch.is_wide else NARROW_COLUMNS)
        self._began = self._logged = time.monotonic()
        self._done = 0
        self._before: int | None = None  # done by earlier runs, and not part of the rate

    def __call__(self, amount: int, facts: str = "") -> None:
        """Report that `amount` more is done; as many of the `facts` are shown next to it as fit."""
        self._show(self._done + amount, facts)

    def reach(self, done: int, facts: str = "") -> None:
        """Report the total done so far; the first call sets the amount done by earlier runs."""
        self._before = done if self._before is None else self._before
        self._show(done, facts)

    def _show(self, done: int, facts: str) -> None:
        self._done = done
        rate = (done - (self._before or 0)) / max(time.monotonic() - self._began, 1e-9)
        facts = f"{done:,} of {self._total:,} {self._unit}, {rate:,.0f}/s{facts and ', '}{facts}"
        prefixes = accumulate(facts.split(", "), "{}, {}".format)
        fitting = [prefix for prefix in prefixes if cell_len(prefix) <= self._room]
        self._bar.update(self._task, completed=done, facts=fitting[-1] if fitting else "")
        if not self._watch.console.is_terminal and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            left = max(self._total - done, 0) / max(rate, 1e-9)
            self._watch.say(f"{self._title}: {facts}, {say_time(left)} left")


class Watch:
    """Shows progress and messages."""

    def __init__(self, console: Console | None = None, is_quiet: bool = False) -> None:
        self.console = console or open_console(stderr=True, quiet=is_quiet, highlight=False)

    @property
    def is_wide(self) -> bool:
        return self.console.width >= WIDE

    def say(self, lines: str | Sequence[str]) -> None:
        for line in [lines] if isinstance(lines, str) else lines:
            self.console.print(line, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, total: int, unit: str = "tokens", *, stays: bool = False) -> Iterator[Stage]:
        """Show one part of the work; its bar disappears at the end unless `stays`."""
        columns = (
            TextColumn("{task.description}"),
            *([BarColumn(bar_width=20)] if self.is_wide else []),
            TextColumn("{task.percentage:>3.0f}% {task.fields[facts]}"),
            *([TimeElapsedColumn()] if self.is_wide else []),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        is_live = self.console.is_terminal and not self.console.quiet
        bar = Progress(*columns, console=self.console, disable=not is_live, transient=not stays)
        with while_shown(bar):
            yield Stage(self, bar, title, total, unit)
