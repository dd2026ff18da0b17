"""What one pass over windows collects about an SAE: how often, how strongly, where and together with which others its
latents fire, and firings to show as examples.

A firing is a latent in a window: its peak there and all its activations. For each latent, the firings with the highest
peaks, those with the lowest, and a sample of tokens are kept: at most one token per window, all equally likely if there
are many more windows than samples. Firings are sorted out whenever as many wait as are kept, so that memory grows with
the number of latents and not with the text.

F latents, B bins of activation, P parts of a window, N firings, E activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import scipy.sparse
import torch

from ....train.sae.kernels.codes import Codes
from ...model.batches import Windows
from .config import Config

Table = Any  # a scipy sparse matrix; scipy's stubs lose its format at every step
BINS = 128  # of activation: four to an octave, from 2^LOWEST up
LOWEST = -16
PARTS = 32  # of a window, at most
LONGEST = 65_535  # tokens of a window: places and numbers of activations in it have 16 bits
SAMPLE_ENTRIES = 1 << 22  # firing together is counted until this many activations are in the table
BEGINNING = 48  # tokens of the first window, for a pattern
SUMS = ("fired", "mass", "highest", "histogram", "by_part", "part_tokens")
TOP, SAMPLE, LOW = 1, 2, 4  # why a firing is kept, as bits
WAITING = 1 << 20  # least number of waiting firings before any are sorted out
MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True, eq=False)
class Firings:
    """Firings with their activations, one after another."""

    latent: np.ndarray  # int32 [N]
    window: np.ndarray  # int32 [N]
    at: np.ndarray  # int32 [N], position of the peak, or of the activation that was drawn
    peak: np.ndarray  # float32 [N], the activation there
    count: np.ndarray  # int32 [N], activations of each
    position: np.ndarray  # uint16 [E]
    value: np.ndarray  # float32 [E]

    def take(self, chosen: np.ndarray) -> Firings:
        starts = np.cumsum(self.count) - self.count
        return self.part(chosen, ranges(starts[chosen], self.count[chosen]))

    def part(self, rows: slice | np.ndarray, entries: slice | np.ndarray) -> Firings:
        of_rows = [array[rows] for array in (self.latent, self.window, self.at, self.peak, self.count)]
        return Firings(*of_rows, *(array[entries] for array in (self.position, self.value)))

    @staticmethod
    def joined(parts: Sequence[Firings]) -> Firings:
        return Firings(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Firings)))

    @property
    def priority(self) -> np.ndarray:
        """The logarithm of the highest of random numbers, one for each activation, from a single draw: the logarithm of
        the highest of n uniform numbers is distributed as that of one, over n. Independent of what else is read."""
        return np.log(uniform(self._id) + np.float32(2.0**-25)) / self.count.astype(np.float32)

    def drawn(self) -> Firings:
        """The same, each at a uniformly drawn one of its activations instead of its peak."""
        place = np.cumsum(self.count) - self.count + (uniform(~self._id) * self.count).astype(np.int64)
        return replace(self, at=self.position[place].astype(np.int32), peak=self.value[place])

    @property
    def _id(self) -> np.ndarray:
        return (self.window.astype(np.uint64) << np.uint64(32)) | self.latent.astype(np.uint64)


class Keeper:
    """Keeps firings of one SAE, as many for each latent as `config` says."""

    def __init__(self, width: int, config: Config) -> None:
        self._config = config
        self._width = width
        kinds = (np.int32, np.int32, np.int32, np.float32, np.int32, np.uint16, np.float32)
        self._set_kept(Firings(*(np.empty(0, kind) for kind in kinds)), np.zeros(0, np.uint8))

    def add(self, firings: Firings) -> None:
        latent, peak = firings.latent, firings.peak
        wanted = (peak > self._least_peak[latent]) | (peak < self._most_peak[latent])
        wanted |= firings.priority > self._least_priority[latent]
        chosen = np.flatnonzero(wanted)
        self._waiting.append(firings.take(chosen))
        self._num_waiting += len(chosen)
        if self._num_waiting > max(len(self._kept.latent), WAITING):
            self._sort_out()

    def state(self) -> dict[str, np.ndarray]:
        """Kept firings with their reasons, followed by waiting ones."""
        return {**vars(self._everything), "reasons": self._reasons}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        everything, reasons = Firings(*(state[field.name] for field in fields(Firings))), state["reasons"]
        kept, entries = len(reasons), int(everything.count[: len(reasons)].sum())
        self._set_kept(everything.part(slice(kept), slice(entries)), reasons)
        self._waiting = [everything.part(slice(kept, None), slice(entries, None))]
        self._num_waiting = len(everything.latent) - kept

    def finish(self) -> tuple[Firings, np.ndarray]:
        """Kept firings by latent, the highest first, and why each is kept: firings at their peaks, with bits TOP and
        LOW, and once more the SAMPLE, at the drawn activations. A latent whose TOP is not full has no sample: its TOP
        already has all its windows."""
        self._sort_out()
        at_peaks = np.flatnonzero(self._reasons & (TOP | LOW))
        is_full = np.bincount(self._kept.latent[self._reasons & TOP > 0], minlength=self._width) >= self._config.top
        sampled = np.flatnonzero((self._reasons & SAMPLE > 0) & is_full[self._kept.latent])
        found = Firings.joined([self._kept.take(at_peaks), self._kept.take(sampled).drawn()])
        reasons = np.concatenate([self._reasons[at_peaks] & (TOP | LOW), np.full(len(sampled), SAMPLE, np.uint8)])
        order = np.lexsort((-found.peak, found.latent))
        return found.take(order), reasons[order]

    def _sort_out(self) -> None:
        """Drop firings that are no longer among the best of their latent."""
        everything, config = self._everything, self._config
        latent, peak, priority = everything.latent, everything.peak, everything.priority
        reasons = np.zeros(len(latent), np.uint8)
        for bit, key, count in ((TOP, peak, config.top), (SAMPLE, priority, config.sample), (LOW, -peak, config.low)):
            reasons[largest(latent, key, count)] |= bit
        kept = np.flatnonzero(reasons)
        self._set_kept(everything.take(kept), reasons[kept])

    @property
    def _everything(self) -> Firings:
        return Firings.joined([self._kept, *self._waiting])

    def _set_kept(self, kept: Firings, reasons: np.ndarray) -> None:
        """Keep only these, and set the bounds beyond which further firings are of interest."""
        self._kept, self._reasons = kept, reasons
        self._waiting: list[Firings] = []
        self._num_waiting = 0
        latent, peak, priority, config, width = kept.latent, kept.peak, kept.priority, self._config, self._width
        top, sample, low = (np.flatnonzero(reasons & reason) for reason in (TOP, SAMPLE, LOW))
        self._least_peak = bound(latent[top], peak[top], width, config.top, np.minimum, -np.inf)
        self._most_peak = bound(latent[low], peak[low], width, config.low, np.maximum, np.inf)
        self._least_priority = bound(latent[sample], priority[sample], width, config.sample, np.minimum, -np.inf)


def largest(group: np.ndarray, key: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` entries with the largest keys in each group, group by group, the largest first."""
    joined = ((group.astype(np.uint64) << np.uint64(32)) | ~sortable(key)).view(np.int64)
    order = torch.from_numpy(joined).sort(stable=True).indices.numpy()  # in a quarter of numpy's time
    return order[ranks(group[order]) < count]


def ranks(group: np.ndarray) -> np.ndarray:
    """int64: the place of each entry in its group, whose entries lie side by side."""
    first = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(first, np.diff(first, append=len(group)))


def sortable(key: np.ndarray) -> np.ndarray:
    """float32 as uint64 whose lower halves sort the same; the upper ones are set, so that `~` clears them."""
    bits = key.astype(np.float32).view(np.int32)
    rising = np.where(bits < 0, ~bits, bits | np.int32(-(2**31))).view(np.uint32)
    return rising.astype(np.uint64) | np.uint64(0xFFFFFFFF00000000)


def bound(group: np.ndarray, key: np.ndarray, groups: int, full: int, worst: np.ufunc, none: float) -> np.ndarray:
    """float32 [groups]: the worst key of every full group; `none` for the others, which take anything."""
    found = np.full(groups, -none, np.float32)
    worst.at(found, group, key)
    return np.where(np.bincount(group, minlength=groups) < full, np.float32(none), found)


def uniform(number: np.ndarray) -> np.ndarray:
    """float32 uniform in [0, 1), hashed from uint64 (splitmix64)."""
    mixed = number + MIX[0]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * MIX[1]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * MIX[2]
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64: the numbers start .. start + count - 1 of each, one after another."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


@dataclass(frozen=True, eq=False)
class Batch:
    """Where the kept tokens of a batch are."""

    first: int  # the number of its first window in the pass
    window: np.ndarray  # int32 [N], the number of each token's window in the pass
    position: np.ndarray  # uint16 [N]
    is_sampled: bool  # whether firing together is counted in it

    @staticmethod
    def of(windows: Windows, first: int, is_sampled: bool) -> Batch:
        window, position = windows.keep.cpu().numpy().nonzero()
        return Batch(first, (window + first).astype(np.int32), position.astype(np.uint16), is_sampled)


class Seen:
    """The sums and the kept firings of one SAE."""

    def __init__(self, width: int, context: int, config: Config) -> None:
        self.width, self.context = width, context
        self.parts = min(PARTS, context)
        self.tokens = 0
        self.fired = np.zeros(width, np.int64)
        self.mass = np.zeros(width, np.float64)
        self.highest = np.zeros(width, np.float32)
        self.histogram = np.zeros((width, BINS), np.int32)
        self.by_part = np.zeros((width, self.parts), np.int32)
        self.part_tokens = np.zeros(self.parts, np.int64)  # kept tokens
        self.keeper = Keeper(width, config)
        self.massive = 0
        self._beginning: tuple[np.ndarray, np.ndarray] | None = None
        self._together: list[Table] = []
        self._together_entries = 0

    def take(self, codes: Sequence[Codes], batch: Batch, ordinary: np.ndarray) -> None:
        """Add the codes of the batch's kept tokens, of which only ordinary ones count."""
        by_token = joined_rows(codes)
        if batch.is_sampled and self._together_entries < SAMPLE_ENTRIES:
            fires = with_rows_emptied(by_token, ordinary)  # one row for each token, as in other SAEs' tables
            self._together.append(firing_table(fires.indices, fires.indptr, self.width))
            self._together_entries += fires.nnz
        if not ordinary.all():
            by_token = by_token[np.flatnonzero(ordinary)]
            batch = replace(batch, window=batch.window[ordinary], position=batch.position[ordinary])
            self.massive += int((~ordinary).sum())
        self.tokens += by_token.shape[0]
        if self._beginning is None:
            first = np.flatnonzero(batch.window == batch.first)[:BEGINNING]
            self._beginning = by_token[first].toarray(), batch.position[first]
        part = batch.position.astype(np.int64) * self.parts // self.context
        self.part_tokens += np.bincount(part, minlength=self.parts)
        columns = by_token.tocsc()
        if columns.nnz:
            self._add(columns, batch, part)

    def _add(self, columns: Table, batch: Batch, part: np.ndarray) -> None:
        counts, token, value = np.diff(columns.indptr), columns.indices, columns.data
        latent, fires = np.repeat(np.arange(self.width), counts), np.flatnonzero(counts)
        self.fired += counts
        self.mass += np.bincount(latent, value, self.width)
        np.add.at(self.histogram.reshape(-1), latent * BINS + bin_of(value), np.int32(1))
        np.add.at(self.by_part.reshape(-1), latent * self.parts + part[token], np.int32(1))
        highest = np.maximum.reduceat(value, columns.indptr[fires])
        self.highest[fires] = np.maximum(self.highest[fires], highest)
        window, position = batch.window[token], batch.position[token]
        begins = np.ones(len(value), bool)  # of a latent in a window
        begins[1:] = window[1:] != window[:-1]
        begins[columns.indptr[fires]] = True
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=len(value))
        peak = np.maximum.reduceat(value, starts)
        places = np.flatnonzero(value == np.repeat(peak, lengths))  # one or more a firing
        owner = np.repeat(np.arange(len(starts)), lengths)[places]
        at = places[np.flatnonzero(np.diff(owner, prepend=-1))]
        self.keeper.add(
            Firings(latent[starts].astype(np.int32), window[starts], position[at].astype(np.int32), peak,
                    lengths.astype(np.int32), position, value)
        )  # fmt: skip

    def state(self) -> dict[str, np.ndarray]:
        acts_TF, positions = self.beginning
        together = self.together
        return {
            **{name: getattr(self, name) for name in SUMS},
            "tokens": np.array([self.tokens, self.massive]),
            "beginning": acts_TF,
            "beginning_positions": positions,
            "together": together.indices,
            "together_starts": together.indptr,
            **self.keeper.state(),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        for name in SUMS:
            setattr(self, name, state[name])
        self.tokens, self.massive = state["tokens"].tolist()
        self._beginning = state["beginning"], state["beginning_positions"]
        self._together = [firing_table(state["together"], state["together_starts"], self.width)]
        self._together_entries = len(state["together"])
        self.keeper.restore(state)

    @property
    def beginning(self) -> tuple[np.ndarray, np.ndarray]:
        """Activations [T, F] and positions of the first tokens that were read."""
        assert self._beginning is not None
        return self._beginning

    @property
    def together(self) -> Table:
        """1 where a latent fires: [sampled tokens, F]."""
        if len(self._together) > 1:  # joined once: an SAE is compared with many
            self._together = [scipy.sparse.vstack(self._together, format="csr")]
        return self._together[0]


def firing_table(latents: np.ndarray, starts: np.ndarray, width: int) -> Table:
    """1 where a latent fires: [tokens, F]."""
    return scipy.sparse.csr_matrix((np.ones(len(latents), np.float32), latents, starts), (len(starts) - 1, width))


def joined_rows(codes: Sequence[Codes]) -> Table:
    """Positive entries of several pieces, as one table [tokens, F]."""
    return scipy.sparse.vstack([_rows(piece) for piece in codes], format="csr")


def _rows(codes: Codes) -> Table:
    values, shape = codes.values, (codes.num_rows, codes.num_latents)
    if codes.support is None:
        row, latent = (values > 0).nonzero(as_tuple=True)
        ends = np.cumsum(np.bincount(row.cpu().numpy(), minlength=shape[0]))
        pointers = np.concatenate([[0], ends])
        return scipy.sparse.csr_matrix((as_numpy(values[row, latent]), as_numpy(latent), pointers), shape=shape)
    support = codes.support
    found = scipy.sparse.csr_matrix((as_numpy(values), as_numpy(support.latents), as_numpy(support.offsets)), shape)
    if not bool((values > 0).all()):
        found.data = np.maximum(found.data, 0)
        found.eliminate_zeros()
    return found


def with_rows_emptied(by_token: Table, kept: np.ndarray) -> Table:
    """The same table, with nothing in rows that are not kept."""
    if kept.all():
        return by_token
    found = (scipy.sparse.diags(kept.astype(np.float32)) @ by_token).tocsr()
    found.eliminate_zeros()
    return found


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def bin_of(value: np.ndarray) -> np.ndarray:
    """The bin of positive float32: the exponent and two bits of the mantissa, so that edges are exact."""
    quarter = (value.astype(np.float32).view(np.int32) >> 21) - ((127 + LOWEST) << 2)
    return np.clip(quarter, 0, BINS - 1)


def lower_edges() -> list[float]:
    """The lower edge of every bin; the first also holds what lies below."""
    return [2.0 ** (LOWEST + number // 4) * (1 + number % 4 / 4) for number in range(BINS)]
