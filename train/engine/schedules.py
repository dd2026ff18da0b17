"""Schedules: pure functions (step, total_steps) -> float, written as frozen records.

A schedule has no state to save: step s of a resumed run gets the same value as in an uninterrupted run. `step` counts
from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

STEEPNESS = 6.0  # of a sigmoid ramp

Schedule = Callable[[int, int], float]  # from a step and the number of steps of the run


@dataclass(frozen=True)
class Constant:
    value: float

    def __call__(self, step: int, total_steps: int) -> float:
        return self.value


@dataclass(frozen=True)
class Every:
    """A value in the first of each `steps` steps, 0 in the others."""

    steps: int
    value: float

    def __call__(self, step: int, total_steps: int) -> float:
        return self.value if step % self.steps == 0 else 0.0


@dataclass(frozen=True)
class Ramp:
    """From `start` to `end` between two fractions of the run, constant before and after; a jump if they are equal."""

    start: float
    end: float
    begin_fraction: float = 0.0
    end_fraction: float = 1.0

    def __call__(self, step: int, total_steps: int) -> float:
        begin = self.begin_fraction * total_steps
        span = (self.end_fraction - self.begin_fraction) * total_steps
        done = _clip01((step - begin) / span) if span > 0 else float(step >= begin)
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class SigmoidRamp:
    """From exactly 0 to exactly 1 between two fractions of the run, along a sigmoid over +-`STEEPNESS`."""

    begin_fraction: float
    end_fraction: float

    def __call__(self, step: int, total_steps: int) -> float:
        done = Ramp(0.0, 1.0, self.begin_fraction, self.end_fraction)(step, total_steps)
        low, high = _sigmoid(-STEEPNESS), _sigmoid(STEEPNESS)
        return (_sigmoid(STEEPNESS * (2.0 * done - 1.0)) - low) / (high - low)


@dataclass(frozen=True)
class Doubling:
    """From `start`, doubling after each of several equal parts of the run, up to `end` in the last."""

    start: int
    end: int

    def __call__(self, step: int, total_steps: int) -> float:
        stages = 1
        while self.start * 2**stages < 2 * self.end:
            stages += 1
        stage = min(stages - 1, stages * step // max(total_steps, 1))
        return float(min(self.end, self.start * 2**stage))


@dataclass(frozen=True)
class Onset:
    """0 for `idle_steps`, then rising to 1 over `rise_steps`, each at most `max_fraction` of the run. If it is not idle
    first, even the first step is above 0."""

    idle_steps: int
    rise_steps: int
    max_fraction: float = 0.1
    power: float = 1.0
    """1: linear; 3: cubic, slow at first."""

    def __call__(self, step: int, total_steps: int) -> float:
        idle, rise = self._stretches(total_steps)
        return _clip01((step + 1 - idle) / (rise + 1)) ** self.power

    def end(self, total_steps: int) -> int:
        """The first step in which it is 1."""
        return sum(self._stretches(total_steps))

    def _stretches(self, total_steps: int) -> tuple[int, int]:
        limit = int(self.max_fraction * total_steps)
        return min(self.idle_steps, limit), min(self.rise_steps, limit)


@dataclass(frozen=True)
class Complement:
    """1 + gain (1 - another schedule): `1 + gain` while the other is 0, and 1 once it is 1."""

    schedule: Schedule
    gain: float

    def __call__(self, step: int, total_steps: int) -> float:
        return 1.0 + self.gain * (1.0 - self.schedule(step, total_steps))


@dataclass(frozen=True)
class HalfLife:
    """1 until the end of an onset, then halved over every further `fraction` of the run."""

    after: Onset
    fraction: float

    def __call__(self, step: int, total_steps: int) -> float:
        past = max(0, step - self.after.end(total_steps)) / total_steps
        return 0.5 ** (past / self.fraction)


@dataclass(frozen=True)
class Decay:
    """1 until the last `fraction` of the run, then linearly to 0 at its end."""

    fraction: float

    def __call__(self, step: int, total_steps: int) -> float:
        start = (1.0 - self.fraction) * total_steps
        if step < start or self.fraction == 0.0:
            return 1.0
        return 1.0 - _clip01((step - start) / (total_steps - start))


@dataclass(frozen=True)
class ExponentialApproach:
    """floor + (start - floor) exp(-step / steps)."""

    start: float
    floor: float
    steps: float

    def __call__(self, step: int, total_steps: int) -> float:
        return self.floor + (self.start - self.floor) * math.exp(-step / self.steps)


@dataclass(frozen=True)
class Product:
    """The product of several schedules."""

    factors: tuple[Schedule, ...]

    def __call__(self, step: int, total_steps: int) -> float:
        return math.prod(factor(step, total_steps) for factor in self.factors)


@dataclass(frozen=True)
class Next:
    """The value of another schedule one step later."""

    schedule: Schedule

    def __call__(self, step: int, total_steps: int) -> float:
        return self.schedule(step + 1, total_steps)


def cut_short(schedule: Schedule, total_steps: int) -> list[tuple[int, int]]:
    """Phases that the run is too short for: the steps requested, and the steps given."""
    match schedule:
        case Onset(idle_steps=idle, rise_steps=rise):
            stretches = zip((idle, rise), schedule._stretches(total_steps), strict=True)
            return [(asked, given) for asked, given in stretches if given < asked]
        case Product(factors=factors):
            return [found for factor in factors for found in cut_short(factor, total_steps)]
        case Complement(schedule=inner) | Next(schedule=inner):
            return cut_short(inner, total_steps)
        case _:
            return []


def _clip01(value: float) -> float:
    return min(1.0, max(0.0, value))


def _sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))
