"""What a run reports while it trains: metrics.jsonl, further trackers, and a line on the console."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from ..data.batch_stream import Feed
from ..data.drawn_rows import Draw
from ..data.shuffle_order import ShuffleQuality
from ..disk.write_and_load_checkpoints import Standing
from ..engine.fleet_of_saes import say_diverged
from ..engine.step import Report
from .after_run import Onlookers
from .process import Process
from .progress import Progress, Trackers
from .run_folder import MetricsLog


class Watch:
    """Records every step, and measures time, shuffling and waiting."""

    def __init__(
        self,
        log: MetricsLog | None,
        trackers: Trackers,
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

    def go_on(self, standing: Standing) -> None:
        """Add to what was measured before the run was resumed."""
        self._before = standing.seconds, standing.waited_seconds
        self.quality = ShuffleQuality(self.quality.ideal, standing.same_pairs, standing.pairs)

    def begin(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def end(self) -> None:
        """Stop the clock: measuring and saving after the last step is not training."""
        self._ended = time.perf_counter()

    def observe(self, step: int, draw: Draw, reports: Mapping[str, Report], diverged: Mapping[str, int]) -> None:
        """Called after each step; `diverged` are SAEs that no longer train, with the step."""
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
            for label, said in found.items():
                self.log.write({"sae": label, **shared, **said})
        for label, scalars in self.last.items():
            self._trackers.log({f"{label}/{name}": value for name, value in scalars.items()}, step)
        if self._progress is not None:
            self._progress.show(step + 1, self.last, self.tokens_per_second)
        if self._onlookers is not None and self.log is not None:
            self.log.require_ours()  # they write a page into the folder
            self._onlookers.look()

    def _mean_over_ranks(self, report: Report) -> dict[str, float]:
        scalars, team = report.scalars(), self._process.team
        if team.size == 1:
            return scalars
        values = torch.tensor(list(scalars.values())) * report.weight
        return dict(zip(scalars, (team.sum(values) / team.size).tolist(), strict=True))
