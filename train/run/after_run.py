"""Hooks that other packages register to follow a run, for example to plot it. Training knows nothing about them."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

AFTER_RUN = "saemill.after_run"
"""Entry points: functions of the folder, a function that prints a line, and the seconds until the next call."""
LEAST_SECONDS, MOST_SHARE = 5.0, 0.01
Say = Callable[[str], None]


def after_run(folder: Path, say: Say, pause: float = 0.0) -> None:
    """Call every registered hook; the folder shows whether the run has ended."""
    for entry in entry_points(group=AFTER_RUN):
        entry.load()(folder, say, pause)


class Onlookers:
    """Calls the hooks while a run trains: every few seconds, in at most a hundredth of its time."""

    def __init__(self, folder: Path, say: Say) -> None:
        self._folder, self._say = folder, say
        self._said: set[str] = set()
        self._next, self._pause, self._looks = 0.0, LEAST_SECONDS, 0

    def look(self) -> None:
        """Called whenever the log has something new."""
        started = time.perf_counter()
        if started < self._next:
            return
        after_run(self._folder, self._say_once, self._pause)
        ended = time.perf_counter()
        self._looks += 1
        if self._looks > 1:  # the first call spends its time on imports
            self._pause = max(LEAST_SECONDS, (ended - started) / MOST_SHARE)
        self._next = ended + self._pause

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)
