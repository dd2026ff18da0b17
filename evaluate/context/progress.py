"""What a person sees of an evaluation: a live bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_SECONDS = 30.0
Advance = Callable[[int], None]

PIPE_WIDTH = 160


def make_console() -> Console:
    """For what a person reads at the end; a pipe has room for a wide table."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, markup=False, width=PIPE_WIDTH)


class Watch:
    """Shows how far an evaluation is, at what rate, and how long it will take."""

    def __init__(self, console: Console | None = None, is_quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=is_quiet, highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, total: int, unit: str = "tokens") -> Iterator[Advance]:
        """One part of the work; call the function it yields with the size of each finished piece."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        is_live = self.console.is_terminal and not self.console.quiet
        begun = logged = time.monotonic()
        done = 0
        with Progress(*columns, console=self.console, disable=not is_live, transient=True) as bar:
            task = bar.add_task(title, total=total, rate="")

            def advance(amount: int) -> None:
                nonlocal done, logged
                done += amount
                rate = done / max(time.monotonic() - begun, 1e-9)
                bar.update(task, completed=done, rate=f"{rate:,.0f} {unit}/s")
                if not is_live and time.monotonic() - logged > LOG_SECONDS:
                    logged = time.monotonic()
                    left = max(total - done, 0) / max(rate, 1e-9)
                    self.say(f"{title}: {done:,} of {total:,} {unit}, {rate:,.0f}/s, {left / 60:,.1f} minutes left")

            yield advance
