"""Pooled features of the texts of some classes, and the rows that a probe sees of them.

A text has one feature vector: activations averaged over its tokens. Few latents fire in a text, so the
matrix is kept sparse by columns: a mean over rows reads what is not zero, and a probe of k latents
takes k columns. N rows, F features.

Work that depends on random draws alone is done once for all SAEs whose generators have the same state (`Memo`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from scipy.sparse import csc_matrix, vstack
from torch import Tensor

T = TypeVar("T")


def seeded(seed: int) -> torch.Generator:
    """A separate generator: the stream that `torch.manual_seed` would give, without global state."""
    return torch.Generator().manual_seed(seed)


class Memo(Generic[T]):
    """Remembers what was computed from a generator's state, by name, and the state that it left."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, bytes], tuple[T, Tensor]] = {}

    def recall(self, what: str, generator: torch.Generator, compute: Callable[[], T]) -> T:
        """What `compute` returns, with the generator as `compute` leaves it."""
        key = what, generator.get_state().numpy().tobytes()
        if key not in self._known:
            self._known[key] = compute(), generator.get_state()
        value, after = self._known[key]
        generator.set_state(after)
        return value


@dataclass(frozen=True)
class Draw:
    """The rows of one binary probe, shuffled."""

    rows: np.ndarray  # int64, of a feature matrix
    labels: np.ndarray  # int32, 1 for the class itself


@dataclass(frozen=True, eq=False)
class Features:
    """Feature vectors [N, F] of the texts of all classes, one class after the other."""

    matrix: csc_matrix  # float32
    spans: Mapping[str, range]
    dtype: torch.dtype = torch.float32
    """The dtype in which the values were computed and dense probes train."""

    @staticmethod
    def of(classes: Mapping[str, Tensor]) -> Features:
        """From one dense matrix for each class."""
        parts = [csc_matrix(part.float().numpy()) for part in classes.values()]
        return Features(csc_matrix(vstack(parts)), spans_of(classes), next(iter(classes.values())).dtype)

    @property
    def width(self) -> int:
        return len(self.matrix.indptr) - 1

    def mean(self, rows: np.ndarray) -> Tensor:
        """[F] in `dtype`."""
        weights = np.zeros(max(span.stop for span in self.spans.values()))
        np.add.at(weights, rows, 1 / len(rows))
        return torch.from_numpy(self.matrix.T @ weights).to(self.dtype)

    def columns(self, draw: Draw, columns: np.ndarray) -> np.ndarray:
        """float32 [rows, columns]."""
        return self.matrix[:, columns].toarray()[draw.rows]

    def dense(self, draw: Draw) -> Tensor:
        """[rows, F] in `dtype`."""
        return torch.from_numpy(self.matrix[draw.rows].toarray()).to(self.dtype)


def spans_of(classes: Mapping[str, Sized]) -> dict[str, range]:
    """The rows of each class when classes follow one another."""
    ends = np.cumsum([0, *map(len, classes.values())]).tolist()
    return {name: range(*ends[i : i + 2]) for i, name in enumerate(classes)}


def draw_probe(spans: Mapping[str, range], name: str, generator: torch.Generator, opposite: str | None = None) -> Draw:
    """The class `name` against as many rows drawn from the other classes, or from `opposite` alone."""
    positive = torch.tensor(spans[name])
    negative = torch.tensor(spans[opposite]) if opposite else _of_each_other(spans, name, generator)
    negative = negative[torch.randperm(len(negative), generator=generator)[: len(positive)]]
    assert len(negative) == len(positive), "as many negatives as positives"
    rows = torch.cat([positive, negative])
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).int()
    order = torch.randperm(len(rows), generator=generator)
    return Draw(rows[order].numpy(), labels[order].numpy())


def _of_each_other(spans: Mapping[str, range], name: str, generator: torch.Generator) -> Tensor:
    others = [torch.tensor(span) for other, span in spans.items() if other != name]
    share = math.ceil(len(spans[name]) / len(others))
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)[:share]] for rows in others])
