"""The progress of a harvest or an evaluation: a live bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from ..cache_schema.cli import open_console
from ..cache_schema.numbers_in_words import say_time

LOG_SECONDS = 30.0
WIDE = 110  # columns; a narrower terminal has no room for the bar and the time that has passed
BAR = 20
BESIDE, BESIDE_WIDE = 22, 22 + BAR + 1 + 8  # what else stands on the line, without the title: share and time left


class Stage:
    """One part of the work: its progress, its rate and the time left."""

    def __init__(self, watch: Watch, bar: Progress, title: str, total: int, unit: str, beside: int) -> None:
        self._watch, self._bar, self._title, self._total, self._unit = watch, bar, title, total, unit
        self._beside = beside + len(title)
        self._task = bar.add_task(title, total=total, facts="")
        self._began = self._logged = time.monotonic()
        self._done = 0
        self._before: int | None = None  # what earlier runs have done, which says nothing about the rate

    def __call__(self, amount: int, facts: str = "") -> None:
        """Report that `amount` more is done; `facts` is shown next to it."""
        self._show(self._done + amount, facts)

    def reach(self, done: int, facts: str = "") -> None:
        """Report how much is done by now; the first call reports what earlier runs have done."""
        self._before = done if self._before is None else self._before
        self._show(done, facts)

    def _show(self, done: int, facts: str) -> None:
        self._done = done
        rate = (done - (self._before or 0)) / max(time.monotonic() - self._began, 1e-9)
        facts = f"{done:,} of {self._total:,} {self._unit}, {rate:,.0f}/s{facts and ', '}{facts}"
        fitting = first_that_fit(facts, self._watch.console.width - self._beside)
        self._bar.update(self._task, completed=done, facts=fitting)
        if not self._watch.console.is_terminal and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            left = max(self._total - done, 0) / max(rate, 1e-9)
            self._watch.say(f"{self._title}: {facts}, {say_time(left)} left")


def first_that_fit(facts: str, room: int) -> str:
    """The first of some facts, at least one: a line that is too long would lose its end, the time left."""
    while len(facts) > room and ", " in facts:
        facts = facts.rpartition(", ")[0]
    return facts


class Watch:
    """Where progress and messages are shown."""

    def __init__(self, console: Console | None = None, is_quiet: bool = False) -> None:
        self.console = console or open_console(stderr=True, quiet=is_quiet, highlight=False)

    def say(self, lines: str | Sequence[str]) -> None:
        for line in [lines] if isinstance(lines, str) else lines:
            self.console.print(line, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, total: int, unit: str = "tokens", *, stays: bool = False) -> Iterator[Stage]:
        """Show one part of the work; its bar disappears at the end unless `stays`."""
        is_wide, in_one_line = self.console.width >= WIDE, Column(no_wrap=True)
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[facts]}"),
            TextColumn("left"),
            TimeRemainingColumn(table_column=in_one_line),
        ]
        if is_wide:
            columns[2:2] = [TimeElapsedColumn(table_column=in_one_line)]
            columns[1:1] = [BarColumn(bar_width=BAR)]
        is_live = self.console.is_terminal and not self.console.quiet
        with Progress(*columns, console=self.console, disable=not is_live, transient=not stays) as bar:
            yield Stage(self, bar, title, total, unit, BESIDE_WIDE if is_wide else BESIDE)
