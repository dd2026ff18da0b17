"""What one pass over windows collects about an SAE: how often, how strongly, where and with which its latents fire.

F latents, B bins of activation, P parts of a window, E entries of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse
import torch

from ....train.sae.kernels.codes import Codes
from ...model.batches import Windows
from .config import Config
from .top_firings import Firings, Keeper

Table = Any  # a sparse matrix of scipy, whose stubs lose its kind at every step
BINS = 128  # of activation: four to an octave, from 2^LOWEST up
LOWEST = -16
PARTS = 32  # of a window, at most
SAMPLE_ENTRIES = 1 << 22
BEGINNING = 48  # tokens of the first window, for a pattern
SUMS = ("fired", "mass", "highest", "histogram", "by_part", "part_tokens")


@dataclass(frozen=True, eq=False)
class Batch:
    """Where the kept tokens of a batch are."""

    first: int  # the number of its first window in the pass
    window: np.ndarray  # int32 [N], the number of each token's window in the pass
    position: np.ndarray  # uint16 [N]
    is_sampled: bool  # whether firing together is counted here

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
            fires = emptied(by_token, ordinary)  # one row for each token, as in other SAEs' tables
            self._together.append(where_it_fires(fires.indices, fires.indptr, self.width))
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
        """Everything that is held, by name."""
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
        self._together = [where_it_fires(state["together"], state["together_starts"], self.width)]
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
        if not self._together:
            return scipy.sparse.csr_matrix((0, self.width), dtype=np.float32)
        if len(self._together) > 1:  # joined once: an SAE is compared with many
            self._together = [scipy.sparse.vstack(self._together, format="csr")]
        return self._together[0]


def where_it_fires(latents: np.ndarray, starts: np.ndarray, width: int) -> Table:
    """1 for each entry of a table by token."""
    return scipy.sparse.csr_matrix((np.ones(len(latents), np.float32), latents, starts), (len(starts) - 1, width))


def joined_rows(codes: Sequence[Codes]) -> Table:
    """Positive entries of several pieces, as one table by token."""
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


def emptied(by_token: Table, kept: np.ndarray) -> Table:
    """The same rows, with nothing in those that are not kept."""
    if kept.all():
        return by_token
    found = (scipy.sparse.diags(kept.astype(np.float32)) @ by_token).tocsr()
    found.eliminate_zeros()
    return found


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def bin_of(value: np.ndarray) -> np.ndarray:
    """The bin of positive float32: exponent and the first two bits behind it, so that edges are exact."""
    quarter = (value.astype(np.float32).view(np.int32) >> 21) - ((127 + LOWEST) << 2)
    return np.clip(quarter, 0, BINS - 1)


def lower_edges() -> list[float]:
    """The lower edge of every bin; the first also holds what lies below."""
    return [2.0 ** (LOWEST + number // 4) * (1 + number % 4 / 4) for number in range(BINS)]
