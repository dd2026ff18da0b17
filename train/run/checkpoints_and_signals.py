"""When a run is saved: by the clock or by steps, at its end, and when a signal asks it to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..config.run_config import CourseConfig
from ..disk.write_and_load_checkpoints import Writer
from ..engine.fleet_of_saes import Fleet
from ..errors import RunInterrupted, resume_command
from ..parallel.processes import SOLO
from .log_and_show_progress import Watch
from .process import Process

CLOCK_EVERY_STEPS = 16  # several processes must agree on the time, which costs a message
SPACING = 20  # saves by the clock are at least this many times as far apart as the last one paused training


@dataclass
class Caught:
    """The signal that asked the run to stop; 0 if none has."""

    signal: int = 0


@contextmanager
def catch_signals(is_launched: bool = False) -> Iterator[Caught]:
    """On Ctrl-C, SIGTERM or SIGHUP, finish the step first; the same signal again stops at once. Does nothing outside
    the main thread, the only one that may catch signals. Ignored signals, such as Ctrl-C in a shell's background jobs
    or SIGHUP under nohup, stay ignored.

    A second SIGHUP changes nothing: when a terminal is closed, the system, the shell and a launcher may each send one.
    Nor does a second SIGTERM in a launch: a cluster may send one to every process and the launcher another, and the
    launcher sends SIGKILL to processes that do not exit.
    """
    caught = Caught()

    def catch(number: int, _: FrameType | None) -> None:
        caught.signal = number
        if number != signal.SIGHUP and not (is_launched and number == signal.SIGTERM):
            signal.signal(number, before[number])

    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if is_main else ()
    before = {int(number): signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Saver:
    """Saves a run's checkpoints. Rank 0 writes them; where SAEs are spread, each process adds its own."""

    def __init__(
        self, folder: Path, course: CourseConfig, fleet: Fleet, watch: Watch, process: Process, run_id: str
    ) -> None:
        self._writer = Writer(folder, process.group.for_another_thread() if process.is_spread else SOLO)
        self._folder, self._course, self._run_id = folder, course, run_id
        self._fleet, self._watch, self._group, self._team = fleet, watch, process.group, process.team
        self._saved_at, self._pause = time.perf_counter(), course.checkpoint_every_seconds

    def save_if_due(self, steps: int, total_steps: int, caught: Caught) -> None:
        """Called after each step: save if it is time; save and stop if a signal was caught."""
        self._writer.check()
        stop = self._group.any(caught.signal != 0)
        if stop or steps == total_steps or self._is_due(steps):
            self.save(steps)
        if stop or steps == total_steps:
            self._writer.finish()
        if stop and steps < total_steps:
            self._group.any(False)  # wait for all: once one exits, the launcher stops others that are still writing
            raise RunInterrupted(
                caught.signal or signal.SIGTERM,
                f"stopped after step {steps} of {total_steps}; resume with: {resume_command(self._folder.parent)}",
            )

    def save(self, steps: int) -> None:
        """Save in the background while the next steps run, unless these would change what is being written."""
        began = time.perf_counter()
        self._writer.finish()  # the new state reuses the memory of the previous one
        writes = self._team.rank == 0
        state = self._fleet.state() if writes or self._course.shard_width else {}  # a collective call with shard_width
        if not writes:  # the first process has the same weights: another copy in host memory would be wasted
            self._fleet.look()
        else:
            self._writer.begin(self._watch.standing(steps, self._run_id), state)
            if self._fleet.lends_state:
                self._writer.finish()
        self._saved_at = time.perf_counter()
        self._pause = max(self._course.checkpoint_every_seconds, SPACING * (self._saved_at - began))

    def close(self) -> None:
        """Finish what is being written."""
        self._writer.close()

    def _is_due(self, steps: int) -> bool:
        if self._course.checkpoint_every_steps is not None:
            return steps % self._course.checkpoint_every_steps == 0
        if self._group.size > 1 and steps % CLOCK_EVERY_STEPS:
            return False
        now = time.perf_counter()
        if self._writer.is_writing:  # the pause starts when it is written: another save would make training wait
            self._saved_at = now
        return not self._group.any(now - self._saved_at <= self._pause)
