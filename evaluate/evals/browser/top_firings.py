"""Chooses the firings that are kept to show a latent by, while the tokens go by.

A firing is a latent in a window: its peak there and all its activations. For each latent, the firings with
the highest peaks, a uniform sample, and those just above the threshold are kept. They are chosen again when as many
firings wait as are kept, so memory grows with the latents and not with the text.

F latents, N firings, E activations of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch

from .config import Config

TOP, SAMPLE, LOW = 1, 2, 4  # why a firing is kept, as bits
WAITING = 1 << 20  # least number of waiting firings before any are sorted out
MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True, eq=False)
class Firings:
    """Firings with their activations, one after another."""

    latent: np.ndarray  # int32 [N]
    window: np.ndarray  # int32 [N]
    at: np.ndarray  # int32 [N], position of the peak
    peak: np.ndarray  # float32 [N]
    count: np.ndarray  # int32 [N], activations of each
    position: np.ndarray  # uint16 [E]
    value: np.ndarray  # float32 [E]

    @staticmethod
    def none() -> Firings:
        kinds = (np.int32, np.int32, np.int32, np.float32, np.int32, np.uint16, np.float32)
        return Firings(*(np.empty(0, kind) for kind in kinds))

    def take(self, chosen: np.ndarray) -> Firings:
        """Some of them, by their numbers."""
        starts = np.cumsum(self.count) - self.count
        return self.part(chosen, ranges(starts[chosen], self.count[chosen]))

    def part(self, rows: slice | np.ndarray, entries: slice | np.ndarray) -> Firings:
        """Some of them, with the entries that are theirs."""
        of_rows = [array[rows] for array in (self.latent, self.window, self.at, self.peak, self.count)]
        return Firings(*of_rows, *(array[entries] for array in (self.position, self.value)))

    @staticmethod
    def joined(parts: list[Firings]) -> Firings:
        return Firings(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Firings)))

    @property
    def priority(self) -> np.ndarray:
        """A random number for each, the same whatever else is kept or read."""
        return scatter((self.window.astype(np.uint64) << np.uint64(32)) | self.latent.astype(np.uint64))


class Keeper:
    """Keeps the firings of one SAE, for each latent as many as `config` says."""

    def __init__(self, width: int, config: Config) -> None:
        self._config = config
        self._width = width
        self._hold(Firings.none(), np.zeros(0, np.uint8))

    def add(self, firings: Firings) -> None:
        latent, peak = firings.latent, firings.peak
        wanted = (peak > self._least_peak[latent]) | (peak < self._most_peak[latent])
        wanted |= firings.priority > self._least_priority[latent]
        chosen = np.flatnonzero(wanted)
        self._waiting.append(firings.take(chosen))
        self._waits += len(chosen)
        if self._waits > max(len(self._kept.latent), WAITING):
            self._settle()

    def state(self) -> dict[str, np.ndarray]:
        """Firings that are kept, with their reasons, followed by those that wait."""
        return {**vars(self._everything), "reasons": self._reasons}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        everything, reasons = Firings(*(state[field.name] for field in fields(Firings))), state["reasons"]
        kept, entries = len(reasons), int(everything.count[: len(reasons)].sum())
        self._hold(everything.part(slice(kept), slice(entries)), reasons)
        self._waiting = [everything.part(slice(kept, None), slice(entries, None))]
        self._waits = len(everything.latent) - kept

    def finish(self) -> tuple[Firings, np.ndarray]:
        """What is kept, by latent and the highest peak first, and why: bits of TOP, SAMPLE, LOW."""
        self._settle()
        order = np.lexsort((-self._kept.peak, self._kept.latent))
        return self._kept.take(order), self._reasons[order]

    def _settle(self) -> None:
        """Drop what is no longer among the best of its latent."""
        everything, config = self._everything, self._config
        latent, peak, priority = everything.latent, everything.peak, everything.priority
        top, sample = largest(latent, peak, config.top), largest(latent, priority, config.sample)
        low = largest(latent, -peak, config.low)
        reasons = np.zeros(len(latent), np.uint8)
        for bit, chosen in ((TOP, top), (SAMPLE, sample), (LOW, low)):
            reasons[chosen] |= bit
        kept = np.flatnonzero(reasons)
        self._hold(everything.take(kept), reasons[kept])

    @property
    def _everything(self) -> Firings:
        return Firings.joined([self._kept, *self._waiting])

    def _hold(self, kept: Firings, reasons: np.ndarray) -> None:
        """Hold only these, and the bounds beyond which others are kept too."""
        self._kept, self._reasons = kept, reasons
        self._waiting: list[Firings] = []
        self._waits = 0
        latent, peak, priority, config, width = kept.latent, kept.peak, kept.priority, self._config, self._width
        top, sample, low = (np.flatnonzero(reasons & reason) for reason in (TOP, SAMPLE, LOW))
        self._least_peak = bound(latent[top], peak[top], width, config.top, np.minimum, -np.inf)
        self._most_peak = bound(latent[low], peak[low], width, config.low, np.maximum, np.inf)
        self._least_priority = bound(latent[sample], priority[sample], width, config.sample, np.minimum, -1.0)


def largest(group: np.ndarray, key: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the `count` entries with the largest keys of every group, group by group, the largest first."""
    joined = ((group.astype(np.uint64) << np.uint64(32)) | ~ordered(key)).view(np.int64)
    order = torch.from_numpy(joined).sort(stable=True).indices.numpy()  # in a quarter of numpy's time
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    return order[rank < count]


def ordered(key: np.ndarray) -> np.ndarray:
    """float32 as the lower half of uint64 that sort the same; `~` of it is taken inside 32 bits."""
    bits = key.astype(np.float32).view(np.int32)
    rising = np.where(bits < 0, ~bits, bits | np.int32(-(2**31))).view(np.uint32)
    return rising.astype(np.uint64) | np.uint64(0xFFFFFFFF00000000)


def bound(group: np.ndarray, key: np.ndarray, groups: int, full: int, worst: np.ufunc, none: float) -> np.ndarray:
    """float32 [groups]: the worst key of every group that is full; `none` for the others, which take anything."""
    found = np.full(groups, -none, np.float32) if np.isinf(none) else np.full(groups, np.inf, np.float32)
    worst.at(found, group, key)
    return np.where(np.bincount(group, minlength=groups) < full, np.float32(none), found)


def scatter(number: np.ndarray) -> np.ndarray:
    """float32 in [0, 1), evenly spread, from uint64 (splitmix64)."""
    mixed = number + MIX[0]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * MIX[1]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * MIX[2]
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64: the numbers start..start + count of each, one after another."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
