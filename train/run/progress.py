"""One line per SAE on a terminal; elsewhere a plain line from time to time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

REFRESH_SECONDS = 0.5
PLAIN_SECONDS = 30.0
WIDE = 110  # columns


class Progress:
    """Shows how training goes. Quiet where it is told to be."""

    def __init__(self, console: Console, labels: Sequence[str], total_steps: int, done: int, *, is_quiet: bool) -> None:
        self._console, self._total, self._is_quiet = console, total_steps, is_quiet
        self._bars = self._tasks = None
        self._printed = time.perf_counter()
        if console.is_terminal and not is_quiet:
            self._bars = _make_bars(console)
            self._tasks: dict[str, TaskID] | None = {
                label: self._bars.add_task(label, total=total_steps, completed=done, numbers="") for label in labels
            }
            self._bars.start()

    def is_due(self, seconds: float) -> bool:
        """Whether it would show something, so long after the last time; the numbers are waited for."""
        if self._is_quiet:
            return False
        return seconds > (PLAIN_SECONDS if self._bars is None else REFRESH_SECONDS)

    def show(self, steps: int, scalars: Mapping[str, Mapping[str, float]], tokens_per_second: float) -> None:
        """The state after so many steps."""
        if self._bars is not None and self._tasks is not None:
            for label, values in scalars.items():
                self._bars.update(self._tasks[label], completed=steps, numbers=summary(values, tokens_per_second))
        elif not self._is_quiet and (time.perf_counter() - self._printed > PLAIN_SECONDS or steps == self._total):
            self._printed = time.perf_counter()
            for label, values in scalars.items():
                line = f"{label} {steps}/{self._total} {summary(values, tokens_per_second)}"
                self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()


def summary(values: Mapping[str, float], tokens_per_second: float) -> str:
    """Loss, sparsity, quality, dead latents and speed in few characters."""
    return (
        f"loss {values['loss']:.4g} L0 {values['l0']:.1f} EV {values['explained_variance']:.3f} "
        f"dead {values['dead_share']:.1%} {tokens_per_second:,.0f} tok/s"
    )


def _make_bars(console: Console) -> RichProgress:
    """A narrow terminal has room for the numbers alone."""
    bar = [BarColumn(bar_width=20)] if console.width >= WIDE else []
    return RichProgress(
        TextColumn("{task.description}"),
        *bar,
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        refresh_per_second=2,
    )
