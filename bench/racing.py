"""Time training steps of several contestants, each in its own process, in turns."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from timing_and_tables import HERE, take_turns
from worker_pipe import Worker, WorkerFailed

TOP_K = ("topk", "batchtopk", "matryoshka")
VARIANTS = (*TOP_K, "standard", "jumprelu", "gated", "p_anneal")
PEERS = ("sae_lens", "dictionary_learning", "sparsify")
ABSENT = {("sae_lens", "p_anneal"), *(("sparsify", variant) for variant in VARIANTS if variant != "topk")}
UNEQUAL = 0.15  # deviation of log row length at which one of 4,096 rows gets about ten times its share of a batch's k
PATIENCE = 120.0  # seconds for a contestant to import everything and build a trainer


@dataclass(frozen=True)
class Entrant:
    """A contestant and its settings."""

    name: str
    script: str
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.script == "ours"

    def knows(self, variant: str) -> bool:
        return (self.script, variant) not in ABSENT


@dataclass
class Outcome:
    """Seconds per step by name and round, peak bytes on the device, failures by name, and when it was measured."""

    seconds: dict[str, list[float]]
    peaks: dict[str, int]
    failures: dict[str, str]
    at: tuple[float, float]


class Contest:
    """The contestants' processes, which serve many races, so that none imports twice."""

    def __init__(self, entrants: Iterable[Entrant], peers_python: str | None, threads: int) -> None:
        self.entrants = [entrant for entrant in entrants if entrant.is_ours or peers_python]
        self._workers: dict[str, Worker] = {}
        for entrant in self.entrants:
            python = sys.executable if entrant.is_ours else peers_python
            command = [python, "-W", "ignore", HERE / "peers" / f"{entrant.script}_step.py"]
            environment = {"OMP_NUM_THREADS": str(threads), **entrant.environment}
            self._workers[entrant.name] = Worker(entrant.name, command, environment)

    def race(
        self, settings: dict[str, Any], rounds: int, steps: int, warm: int = 0, names: Iterable[str] | None = None
    ) -> Outcome:
        """Time in turns all entrants that have the variant; those that fail drop out, and the others continue."""
        wanted = set(self._workers) if names is None else set(names)
        taking_part = [e for e in self.entrants if e.knows(settings["variant"]) and e.name in wanted]
        failures = self._open(taking_part, settings)
        peaks: dict[str, int] = {}

        def turn(name: str) -> float:
            if name in failures:
                return math.nan
            try:
                answer = self._workers[name].ask(PATIENCE, steps=steps, warm=warm, release=True)
            except WorkerFailed as failure:
                failures[name] = str(failure)
                return math.nan
            peaks[name] = max(peaks.get(name, 0), answer["peak"])
            return answer["seconds"]

        jobs = {entrant.name: (lambda name=entrant.name: turn(name)) for entrant in taking_part}
        take_turns(1, jobs)  # kernels are compiled, the allocator grows
        start = time.time()
        seconds = take_turns(rounds, jobs)
        stop = time.time()
        self._close(taking_part, failures)
        complete = {name: values for name, values in seconds.items() if name not in failures}
        return Outcome(complete, {name: peaks[name] for name in complete}, failures, (start, stop))

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    def _open(self, entrants: list[Entrant], settings: dict[str, Any]) -> dict[str, str]:
        """Open all at once; return the failures by name."""
        failures: dict[str, str] = {}
        for entrant in entrants:
            try:
                self._workers[entrant.name].send(open=settings | entrant.settings)
            except WorkerFailed as failure:
                failures[entrant.name] = str(failure)
        until = time.monotonic() + PATIENCE
        for entrant in entrants:
            if entrant.name not in failures:
                try:
                    self._workers[entrant.name].receive(max(0.1, until - time.monotonic()))
                except WorkerFailed as failure:
                    failures[entrant.name] = str(failure)
        return failures

    def _close(self, entrants: list[Entrant], failures: dict[str, str]) -> None:
        for entrant in entrants:
            try:
                self._workers[entrant.name].ask(30, close=True)
            except WorkerFailed as failure:
                failures.setdefault(entrant.name, str(failure))


def make_batches(folder: str, rows: int, d_model: int, count: int = 3, spread: float = 0.0) -> str:
    """Write batches of Gaussian rows with mean norm sqrt(D) and lognormal lengths: if latents are chosen over a whole
    batch, a step's cost may depend on how unequally rows get them, and on nothing else about the data."""
    generator = np.random.default_rng(0)
    Path(folder).mkdir(exist_ok=True)
    for index in range(count):
        batch = generator.standard_normal((rows, d_model), dtype=np.float32)
        if spread:
            batch *= np.exp(spread * generator.standard_normal((rows, 1), dtype=np.float32))
        np.save(Path(folder) / f"batch_{index}.npy", batch)
    return folder
