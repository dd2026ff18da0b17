"""The SAEs of a run, trained side by side on the same draws.

Each has its own weights, optimiser, schedules, counters and random numbers, and sees the rows that it
would see alone: a fleet of one and a member of many train to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor

from .config import Member
from .data.draw import Draw
from .errors import ActivationsNotFinite, NonFiniteLoss, StoppedElsewhere, TrainError
from .ranks import Ranks
from .sae.scaling import Stats, joined_stats
from .shards import Shard
from .step import Report, Trainee

SHOWN = 8  # windows that a message lists


class Fleet:
    """Trainees by label."""

    def __init__(
        self,
        members: Sequence[Member],
        stats: Mapping[int, Stats],
        total_steps: int,
        device: torch.device,
        ranks: Ranks,
        shard: Shard | None = None,
    ) -> None:
        self._ranks = ranks
        self.members = {member.label: member for member in members}
        self.needs = {member.label: member.config.request() for member in members}
        self.trainees = {
            member.label: _make_trainee(member, stats, total_steps, device, ranks, shard) for member in members
        }

    @property
    def steps_taken(self) -> int:
        return next(iter(self.trainees.values())).step_index

    def step(self, draw: Draw) -> dict[str, Report]:
        """One step of every SAE."""
        reports = {}
        for label, trainee in self.trainees.items():
            try:
                reports[label] = trainee.step(draw.batch(self.needs[label]))
            except NonFiniteLoss as error:
                raise _with_place(label, error, draw, self.needs[label].windows, self._ranks) from None
        return reports

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {label: trainee.state() for label, trainee in self.trainees.items()}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Sharded weights are whole inside, for all processes that enter together."""
        with ExitStack() as stack:
            for trainee in self.trainees.values():
                stack.enter_context(trainee.gathered())
            yield

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for label, trainee in self.trainees.items():
            trainee.load_state(state[label])


def _make_trainee(
    member: Member,
    stats: Mapping[int, Stats],
    total_steps: int,
    device: torch.device,
    ranks: Ranks,
    shard: Shard | None,
) -> Trainee:
    needs = member.config.request()
    d_model = next(iter(stats.values())).width
    assembly = member.config.build(d_model, *_stats_of(needs.inputs, needs.targets, stats))
    return Trainee(member.label, assembly, total_steps, device, ranks, shard)


def _stats_of(
    inputs: tuple[int, ...], targets: tuple[int, ...] | None, stats: Mapping[int, Stats]
) -> tuple[Stats, ...]:
    sides = (inputs,) if targets is None else (inputs, targets)
    return tuple(
        stats[layers[0]] if len(layers) == 1 else joined_stats([stats[layer] for layer in layers]) for layers in sides
    )


def _with_place(label: str, error: NonFiniteLoss, draw: Draw, windows: bool, ranks: Ranks) -> TrainError:
    """The same error with the part of the store that the step was trained on; all ranks ask."""
    broken = draw.non_finite_rows(windows)
    is_anywhere = bool(ranks.sum(torch.tensor([int(broken.any())], device=draw.device)))
    if broken.any():
        place = _place(draw, draw.store_windows(windows)[broken])
        return ActivationsNotFinite(
            f"{label}, step {error.step}: the store holds activations that are no finite numbers: {place}. "
            "Harvest again in a dtype that can hold them, or leave these windows out"
        )
    if is_anywhere:
        return StoppedElsewhere(
            f"{label}, step {error.step}: another process's rows hold activations that are no finite numbers; "
            "its own message names them"
        )
    place = _place(draw, draw.store_windows(windows))
    return NonFiniteLoss(error.step, error.terms, f"{label}, {place} (their activations are finite: training diverged)")


def _place(draw: Draw, windows: np.ndarray) -> str:
    """Shards and windows in words."""
    distinct = np.unique(windows)
    pieces = [piece for piece in draw.block.pieces if ((piece.start <= distinct) & (distinct < piece.stop)).any()]
    return f"shard {_listed(np.unique([piece.shard for piece in pieces]))}, windows {_listed(distinct)}"


def _listed(numbers: np.ndarray) -> str:
    more = len(numbers) - SHOWN
    return ", ".join(map(str, numbers[:SHOWN])) + (f" and {more} more" if more > 0 else "")
