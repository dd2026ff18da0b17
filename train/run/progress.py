"""Progress of training: a live line per SAE on a terminal, elsewhere a plain line from time to time.

Further logs go through accelerate's trackers (wandb, tensorboard and others); none is loaded unless requested.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ...cache_schema.numbers_in_words import first_line, say_time
from ...cache_schema.strict_json import flatten
from ..errors import ConfigInvalid, TrackerMissing

REFRESH_SECONDS = 0.5
PLAIN_SECONDS = 30.0
WIDE = 110  # columns


class Output:
    """Where a run prints. When its terminal or pipe is closed, the run goes on, and what it prints is dropped."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        try:
            return self._file.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._file.fileno())  # with what is still buffered, which would fail again at the exit
        os.close(nowhere)


class Progress:
    """Shows the progress of training."""

    def __init__(self, console: Console, labels: Sequence[str], total_steps: int, done: int) -> None:
        self._console, self._total = console, total_steps
        self._bars = self._tasks = None
        self._asked = self._printed = self._began = time.perf_counter()
        self._done = done
        if console.is_terminal:
            self._bars = _make_bars(console)
            self._tasks: dict[str, TaskID] | None = {
                label: self._bars.add_task(label, total=total_steps, completed=done, numbers="") for label in labels
            }
            self._bars.start()

    def is_due(self) -> bool:
        """Whether it is time to fetch numbers again, which makes the GPU wait."""
        return time.perf_counter() - self._asked > (PLAIN_SECONDS if self._bars is None else REFRESH_SECONDS)

    def show(self, steps: int, scalars: Mapping[str, Mapping[str, float]], tokens_per_second: float) -> None:
        """Show the state after this many steps."""
        self._asked = time.perf_counter()
        if self._bars is not None and self._tasks is not None:
            for label, values in scalars.items():
                self._bars.update(self._tasks[label], completed=steps, numbers=summary(values, tokens_per_second))
        elif self._asked - self._printed > PLAIN_SECONDS or steps == self._total:
            self._printed = self._asked
            seconds = (self._asked - self._began) * (self._total - steps) / max(1, steps - self._done)
            left = f" {say_time(seconds)} left" if steps < self._total else ""
            for label, values in scalars.items():
                line = f"{label} {steps}/{self._total} {summary(values, tokens_per_second)}{left}"
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
    """A narrow terminal has room only for the numbers."""
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


class Trackers:
    """The trackers of a run; does nothing if there are none."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        self._trackers = [_open_tracker(name, folder) for name in names]
        plain = {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in flatten(config).items()}
        for tracker in self._trackers:
            tracker.store_init_configuration(plain)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigInvalid(f"expected trackers among {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, found {name!r}")
        if name not in available:
            raise TrackerMissing(f"the tracker {name} is not installed: pip install {name}")


def _open_tracker(name: str, folder: Path) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    place = {"logging_dir": str(folder / "trackers")} if kind.requires_logging_directory else {}
    try:
        tracker = kind(folder.name, **place)
        tracker.start()
    except Exception as error:  # another package may raise anything
        raise TrackerMissing(f"the tracker {name} could not be started: {first_line(error)}") from error
    return tracker
