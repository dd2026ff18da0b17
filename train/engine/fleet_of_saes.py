"""The SAEs of a run, trained side by side on the same draws.

Each has its own weights, optimiser, schedules, counters and random numbers, and sees the same rows as alone, so it
trains to the same bits in a fleet of any size. An SAE whose loss is no longer finite stops training and keeps the
weights of the previous step; the others continue. Checkpoints mark it by its smaller number of steps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...cache_schema import Span
from ...cache_schema.sites import Place
from ..data.batch import Kind
from ..data.drawn_rows import Draw
from ..data.scaling import Stats, bounds_of, joined_stats
from ..errors import (
    ActivationsNotFinite,
    MemoryTooSmall,
    NonFiniteLoss,
    StateInvalid,
    StoppedElsewhere,
    TrainError,
    TrainingDiverged,
)
from ..parallel.sums_over_processes import Ranks
from .step import LOOK_EVERY, Report, Trainee
from .terms_and_constraints import Assembly, Buildable

SHOWN = 8  # most windows that a message lists
DIVERGED = "their activations are finite: training diverged"
NOT_FINITE = "the store holds activations that are not finite numbers"
REMEDY = "Harvest again in a dtype that can hold them, or leave out these windows"
ELSEWHERE = "another process's rows hold activations that are not finite numbers; its message names them"


class Past(NamedTuple):
    """Where a step's rows came from."""

    step: int
    pieces: Sequence[Span]
    windows: Mapping[Kind, np.ndarray]


class Fleet:
    """Trainees by label, made from their configs; statistics by layer."""

    def __init__(
        self,
        configs: Mapping[str, Buildable],
        stats: Mapping[Place, Stats],
        total_steps: int,
        device: torch.device,
        ranks: Ranks,
        split: Ranks | None = None,
        may_empty: bool = False,
    ) -> None:
        """`may_empty`: the run continues even if all of these SAEs diverge, since other processes train more."""
        self.ranks = ranks
        self.steps_taken = 0
        self.diverged: dict[str, int] = {}  # by label: the steps that an SAE took before it diverged
        self._may_empty = may_empty
        self._news: list[str] = []
        self._past: deque[Past] = deque(maxlen=LOOK_EVERY + 1)  # steps whose losses the host has not read yet
        self.stats = stats
        self.needs = {label: config.needs() for label, config in configs.items()}
        self.trainees = {
            label: Trainee(label, _build(config, stats), total_steps, device, ranks, split)
            for label, config in configs.items()
        }
        self._spent: dict[str, tuple[float, float]] = dict.fromkeys(configs, (0.0, 0.0))  # seconds and steps

    def step_seconds(self, label: str) -> float | None:
        """Mean time of one SAE's steps in this process; None on a GPU, where the host does not wait for them."""
        seconds, steps = self._spent[label]
        return seconds / steps if steps and self.trainees[label].device.type == "cpu" else None

    @property
    def training(self) -> dict[str, Trainee]:
        """The SAEs that have not diverged."""
        return {label: trainee for label, trainee in self.trainees.items() if label not in self.diverged}

    def take_news(self) -> list[str]:
        """Messages about SAEs that have diverged since the last call."""
        news, self._news = self._news, []
        return news

    def step(self, draw: Draw) -> dict[str, Report]:
        """One step of every SAE that has not diverged."""
        reports = {}
        if draw.device.type != "cpu":
            windows = {kind: draw.store_windows(kind) for kind in draw.rows}
            self._past.append(Past(self.steps_taken, draw.block.pieces, windows))
        for label, trainee in self.training.items():
            started, (seconds, steps) = time.perf_counter(), self._spent[label]
            try:
                reports[label] = trainee.step(draw.batch(self.needs[label]))
            except NonFiniteLoss as error:
                self._stop_training(label, self._add_place(label, error, draw))
                continue
            except torch.OutOfMemoryError as error:
                raise out_of_memory(f"{label}: {draw.device} has no memory left for a step", error) from None
            self._spent[label] = seconds + time.perf_counter() - started, steps + 1
        self.steps_taken += 1
        return reports

    @property
    def lends_state(self) -> bool:
        """Whether `state` returns live tensors, which the next step changes."""
        return any(trainee.device.type == "cpu" for trainee in self.trainees.values())

    def state(self) -> dict[str, dict[str, Tensor]]:
        self.look()
        return {label: trainee.state() for label, trainee in self.trainees.items()}

    def look(self) -> None:
        """Stop training SAEs whose loss was not finite in a step since the last look; raise if none is left."""
        for label, trainee in self.training.items():
            try:
                trainee.look()
            except NonFiniteLoss as error:
                self._stop_training(label, self._add_place(label, error, None))

    def _stop_training(self, label: str, error: TrainError) -> None:
        """Continue without an SAE that diverged. The last one's divergence, or any other error, ends the run."""
        if not isinstance(error, NonFiniteLoss) or not (self._may_empty or self.training.keys() - {label}):
            raise error from None
        self.diverged[label] = self.trainees[label].step_index = error.step
        self.trainees[label].replays.end()
        self._news.append(f"{error}. The others continue without it")

    def _add_place(self, label: str, error: NonFiniteLoss, draw: Draw | None) -> TrainError:
        """The error, naming the part of the store that the step trained on; a collective call."""
        kind = self.needs[label].kind(bounds_of(self.stats))
        if draw is not None and error.is_input_finite is None:
            broken, windows, device = draw.non_finite_rows(kind), draw.store_windows(kind), draw.device
            is_broken = bool(broken.any())
            place = _place(draw.block.pieces, windows[broken] if is_broken else windows)
            found = f"{NOT_FINITE}: {place}"
        else:  # the loss was read later, when the step's draw is gone: only its windows are known
            is_broken, device = not error.is_input_finite, torch.device("cpu")
            places = (_place(past.pieces, past.windows[kind]) for past in self._past if past.step == error.step)
            place = next(places, "")
            found = f"{NOT_FINITE} among {place}"
        is_anywhere = bool(self.ranks.sum(torch.tensor([int(is_broken)], device=device)))
        if is_broken:
            return ActivationsNotFinite(f"{label}, step {error.step}: {found}. {REMEDY}")
        if is_anywhere:
            return StoppedElsewhere(f"{label}, step {error.step}: {ELSEWHERE}")
        return NonFiniteLoss(error.step, error.terms, f"{label}, {place} ({DIVERGED})")

    @contextmanager
    def gather_weights(self) -> Iterator[None]:
        """A context in which sharded weights are whole; a collective call."""
        with ExitStack() as stack:
            for trainee in self.trainees.values():
                stack.enter_context(trainee.gather_weights())
            yield

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """Continue after this many steps."""
        missing = [label for label in self.trainees if label not in state]
        if missing:
            raise StateInvalid(
                f"expected a checkpoint with {', '.join(missing)}, found none of that name: an SAE must keep the "
                "label that it had in config.json when the run began"
            )
        for label, trainee in self.trainees.items():
            trainee.load_state(state[label])
        self.steps_taken = steps
        self.diverged = {label: one.step_index for label, one in self.trainees.items() if one.step_index < steps}
        if not (self._may_empty or self.training):
            raise TrainingDiverged(say_all_diverged({label: say_diverged(at) for label, at in self.diverged.items()}))


def say_diverged(step: int) -> str:
    return f"its loss was not finite in step {step}: training diverged"


def say_all_diverged(diverged: Mapping[str, str]) -> str:
    said = "; ".join(f"{label}: {what}" for label, what in diverged.items())
    return f"{said}. Start the run again with a lower learning rate"


def _build(config: Buildable, stats: Mapping[Place, Stats]) -> Assembly:
    needs = config.needs()
    sides = (needs.input_places,) if needs.targets is None else (needs.input_places, needs.target_places)
    joined = (joined_stats([stats[layer] for layer in layers]) for layers in sides)
    return config.build(stats[needs.input_places[0]].width, *joined)


def out_of_memory(what: str, error: torch.OutOfMemoryError) -> MemoryTooSmall:
    """The error, with the allocator's sentences on requested and free memory, and what to change."""
    said = ". ".join(str(error).split(". ")[:3])
    return MemoryTooSmall(
        f"{what} ({said}). Use fewer SAEs at once, a smaller --width, data.batch_tokens or data.pool_tokens, "
        "or another --device"
    )


def _place(pieces: Sequence[Span], windows: np.ndarray) -> str:
    """Shards and windows in words."""
    distinct = np.unique(windows)
    pieces = [piece for piece in pieces if ((piece.start <= distinct) & (distinct < piece.stop)).any()]
    return f"shard {_list_numbers(np.unique([piece.shard for piece in pieces]))}, windows {_list_numbers(distinct)}"


def _list_numbers(numbers: np.ndarray) -> str:
    more = len(numbers) - SHOWN
    return ", ".join(map(str, numbers[:SHOWN])) + (f" and {more} more" if more > 0 else "")
