"""What others do with a run, such as drawing it. They register themselves; training knows none."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

AFTER_RUN = "saemill.after_run"  # entry points: functions (folder, how to say a line, seconds until the next call)
LEAST_SECONDS, SHARE = 5.0, 0.01
Say = Callable[[str], None]


def after_run(folder: Path, say: Say, pause: float = 0.0) -> None:
    """Call everyone who wants to know; whether the run has ended, its folder says."""
    for entry in entry_points(group=AFTER_RUN):
        entry.load()(folder, say, pause)


class Onlookers:
    """Those same people while a run trains: every few seconds, and never for more than a hundredth of its time."""

    def __init__(self, folder: Path, say: Say) -> None:
        self._folder, self._say = folder, say
        self._said: set[str] = set()
        self._next, self._pause, self._looks = 0.0, LEAST_SECONDS, 0

    def look(self) -> None:
        """Called whenever there is something new in the log."""
        started = time.perf_counter()
        if started < self._next:
            return
        after_run(self._folder, self._say_once, self._pause)
        ended = time.perf_counter()
        self._looks += 1
        if self._looks > 1:  # the first time is spent importing
            self._pause = max(LEAST_SECONDS, (ended - started) / SHARE)
        self._next = ended + self._pause

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)
