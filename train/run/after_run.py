"""What others do with a run that has ended, such as drawing it. They register themselves; training knows none."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

AFTER_RUN = "saemill.after_run"  # entry points: functions (folder of the run, how to say a line)


def after_run(folder: Path, say: Callable[[str], None]) -> None:
    """Call everyone who wants to know."""
    for entry in entry_points(group=AFTER_RUN):
        entry.load()(folder, say)
