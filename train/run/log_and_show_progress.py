"""What a run reports while it trains: metrics.jsonl, and per SAE a live line on a terminal, or occasional plain lines
elsewhere.

Additional logs go through accelerate's trackers (wandb, tensorboard and others); none is loaded unless requested.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ...cache_schema.numbers_in_words import first_line, say_time
from ...cache_schema.strict_json import flatten
from ..data.batch_stream import Feed
from ..data.drawn_rows import Draw
from ..data.shuffle_order import ShuffleQuality
from ..disk.write_and_load_checkpoints import Standing
from ..engine.fleet_of_saes import say_diverged
from ..engine.step import Report
from ..errors import ConfigInvalid, TrackerMissing
from .after_run import Onlookers
from .process import Process
from .run_folder import MetricsLog

REFRESH_SECONDS = 0.5
PLAIN_SECONDS = 30.0
WIDE = 110  # columns


class Watch:
    """Records every step, and measures time, shuffling and waiting."""

    def __init__(
        self,
        log: MetricsLog | None,
        trackers: Trackers | None,
        progress: Progress | None,
        feed: Feed,
        process: Process,
        labels: Sequence[str],
        every_steps: int,
        total_steps: int,
        onlookers: Onlookers | None = None,
    ) -> None:
        self.log, self._trackers, self._progress = log, trackers, progress
        self._feed, self._process, self._labels, self._onlookers = feed, process, labels, onlookers
        self._every, self._total = every_steps, total_steps
        self.quality = ShuffleQuality(feed.ideal_share)
        self.last: dict[str, dict[str, float]] = {}
        self._before = (0.0, 0.0)  # seconds, seconds waited: before this process resumed the run
        self._tokens = 0.0
        self._started = time.perf_counter()
        self._ended: float | None = None

    def standing(self, step: int, run_id: str) -> Standing:
        """What `resume` continues from; the log up to here is on disk."""
        if self.log is not None:
            self.log.sync()
        return Standing(
            step=step,
            metrics_bytes=0 if self.log is None else self.log.size,
            seconds=self.seconds,
            waited_seconds=self.waited_seconds,
            same_pairs=self.quality.same,
            pairs=self.quality.pairs,
            run_id=run_id,
        )

    def resume(self, standing: Standing) -> None:
        """Continue from the measurements made before the run was resumed."""
        self._before = standing.seconds, standing.waited_seconds
        self.quality = ShuffleQuality(self.quality.ideal, standing.same_pairs, standing.pairs)

    def begin(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def end(self) -> None:
        """Stop the clock: measuring and saving after the last step is not training."""
        self._ended = time.perf_counter()

    def observe(self, step: int, draw: Draw, reports: Mapping[str, Report], diverged: Mapping[str, int]) -> None:
        """Called after each step; `diverged` are SAEs that no longer train, each with the step at which it stopped."""
        self._tokens += self._feed.batch_tokens
        if step % self._every == 0 or step + 1 == self._total:
            self.quality = self.quality.with_batch(draw.labels(self._feed.is_windowed))
            self._record(step, reports, diverged)
        elif self._progress is not None and self._progress.is_due():
            scalars = {label: report.scalars() for label, report in reports.items()}
            self._progress.show(step + 1, scalars, self.tokens_per_second)

    @property
    def seconds(self) -> float:
        """Time spent training, without the wait for the very first block."""
        return self._before[0] + self._seconds_here

    @property
    def waited_seconds(self) -> float:
        return self._before[1] + self._feed.loader.waited_seconds

    @property
    def waiting_share(self) -> float:
        """Share of the time that training waited for data."""
        return self.waited_seconds / self.seconds if self.seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of this process, for each SAE."""
        return self._tokens / self._seconds_here if self._seconds_here > 0 else 0.0

    @property
    def _seconds_here(self) -> float:
        now = time.perf_counter() if self._ended is None else self._ended
        return max(0.0, now - self._started - self._feed.loader.first_wait_seconds)

    def _record(self, step: int, reports: Mapping[str, Report], diverged: Mapping[str, int]) -> None:
        """One line per SAE. A collective call; rank 0 writes."""
        own = {label: {"diverged": say_diverged(at)} for label, at in diverged.items()}
        found = self._process.collect(
            own | {label: self._mean_over_ranks(report) for label, report in reports.items()}, self._labels
        )
        self.last = {label: scalars for label, scalars in found.items() if "diverged" not in scalars}
        shared = {
            "step": step,
            "tokens": round((step + 1) * self._feed.batch_tokens),
            "same_document_ratio": self.quality.ratio,
            "waiting_share": self.waiting_share,
            "tokens_per_second": self.tokens_per_second,
        }
        if self.log is not None:
            for label, scalars in found.items():
                self.log.write({"sae": label, **shared, **scalars})
        if self._trackers is not None:
            for label, scalars in self.last.items():
                self._trackers.log({f"{label}/{name}": value for name, value in scalars.items()}, step)
        if self._progress is not None:
            self._progress.show(step + 1, self.last, self.tokens_per_second)
        if self._onlookers is not None and self.log is not None:
            self.log.require_ours()  # onlookers write a page into the folder
            self._onlookers.look()

    def _mean_over_ranks(self, report: Report) -> dict[str, float]:
        scalars, team = report.scalars(), self._process.team
        if team.size == 1:
            return scalars
        values = torch.tensor(list(scalars.values())) * report.weight
        return dict(zip(scalars, (team.sum(values) / team.size).tolist(), strict=True))


class Output:
    """Where a run prints. If its terminal or pipe is closed, the run continues and its output is dropped."""

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
        os.dup2(nowhere, self._file.fileno())  # for buffered text too, which would fail again at exit
        os.close(nowhere)


class Progress:
    """Shows the progress of training."""

    def __init__(self, console: Console, labels: Sequence[str], total_steps: int, done: int) -> None:
        self._console, self._total = console, total_steps
        self._bars = _make_bars(console) if console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._shown = self._printed = self._started = time.perf_counter()
        self._done = done
        if self._bars is not None:
            for label in labels:
                self._tasks[label] = self._bars.add_task(label, total=total_steps, completed=done, numbers="")
            self._bars.start()

    def is_due(self) -> bool:
        """Whether it is time to fetch numbers again, which makes the GPU wait."""
        return time.perf_counter() - self._shown > (PLAIN_SECONDS if self._bars is None else REFRESH_SECONDS)

    def show(self, steps: int, scalars: Mapping[str, Mapping[str, float]], tokens_per_second: float) -> None:
        """Show the state after this many steps."""
        self._shown = time.perf_counter()
        if self._bars is not None:
            for label, values in scalars.items():
                self._bars.update(self._tasks[label], completed=steps, numbers=summary(values, tokens_per_second))
        elif self._shown - self._printed > PLAIN_SECONDS or steps == self._total:
            self._printed = self._shown
            seconds = (self._shown - self._started) * (self._total - steps) / max(1, steps - self._done)
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
    """The trackers of a run, if any."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        plain = {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in flatten(config).items()}
        self._trackers: list[Any] = []
        try:
            for name in names:
                self._trackers.append(_open_tracker(name, folder))
                self._trackers[-1].store_init_configuration(plain)
        except BaseException:
            self.close()  # those already started must not wait for a run that never starts
            raise

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
