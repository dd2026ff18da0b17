"""Pooled features: activations averaged over each text of some classes, and the rows that a probe sees.

The model reads every text once, and every SAE encodes the result:
1. Special tokens (BOS, EOS, padding) are set to zero in the residual.
2. A position is valid when its residual does not sum to zero; features are averaged over valid positions.
   A text without any has features of zero.
3. An SAE encodes all positions, including zeroed ones. `latents` leaves those out. `leaky` keeps them, divided by the
   number of valid ones: SAEBench's ablations do not mask them again, so a latent that fires on a zero vector counts
   once for every padding token.

Few latents fire in a text, so the matrix is sparse by columns: a mean over rows reads only nonzero entries, and a probe
on k latents takes k columns. Work that depends only on random draws is done once for all SAEs whose generators have the
same state (`Memo`).

N rows, F features; W texts of a batch, T positions, D residual width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix
from torch import Tensor

from ...context.context import Context
from ...context.loaded_sae import LoadedSae, batch_size_for, layers_of, together
from ...context.prompt_positions import stacked, to_sparse
from ...context.saes_usable_on_text import attention_of
from ...model.batches import Windows, make_rows, run_windows
from ...model.smaller_pieces import PieceSize, in_pieces
from .draw_classes import Classes, Task

T = TypeVar("T")


def seeded(seed: int) -> torch.Generator:
    """A separate generator: the stream that `torch.manual_seed` would give, without global state."""
    return torch.Generator().manual_seed(seed)


class Memo(Generic[T]):
    """Remembers results computed from a generator's state, by name, and the state in which they left it."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, bytes], tuple[T, Tensor]] = {}

    def recall(self, name: str, generator: torch.Generator, compute: Callable[[], T]) -> T:
        """The result of `compute`, with the generator left as `compute` leaves it."""
        key = name, generator.get_state().numpy().tobytes()
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

    @property
    def width(self) -> int:
        return len(self.matrix.indptr) - 1

    def mean(self, rows: np.ndarray) -> Tensor:
        """[F] in `dtype`."""
        weights = np.zeros(max(span.stop for span in self.spans.values()))
        np.add.at(weights, rows, 1 / len(rows))
        return torch.from_numpy(self.matrix.T @ weights).to(self.dtype)

    def contrast(self, draw: Draw) -> Tensor:
        """[F]: the mean over rows of the class minus that over the others."""
        return self.mean(draw.rows[draw.labels == 1]) - self.mean(draw.rows[draw.labels == 0])

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
    """The class `name` against the same number of rows drawn from the other classes, or from `opposite` alone."""
    positive = torch.tensor(spans[name])
    if opposite:
        negative = torch.tensor(spans[opposite])
    else:  # the same number of each other class
        others = [torch.tensor(span) for other, span in spans.items() if other != name]
        share = math.ceil(len(positive) / len(others))
        negative = torch.cat([rows[torch.randperm(len(rows), generator=generator)[:share]] for rows in others])
    negative = negative[torch.randperm(len(negative), generator=generator)[: len(positive)]]
    assert len(negative) == len(positive), "as many negatives as positives"
    rows = torch.cat([positive, negative])
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).int()
    order = torch.randperm(len(rows), generator=generator)
    return Draw(rows[order].numpy(), labels[order].numpy())


@dataclass(frozen=True, eq=False)
class Piece:
    """Mean residuals by layers and mean latents by SAE of some texts. float32 [W, features]."""

    model: Mapping[tuple[int, ...], csr_matrix]
    latents: Mapping[LoadedSae, csr_matrix]
    leaky: Mapping[LoadedSae, csr_matrix]


@dataclass(eq=False)
class Pool:
    rows: Mapping[str, int]  # by text
    whole: Piece
    dtype: torch.dtype  # of the model
    _of_model: dict[tuple[tuple[int, ...], int], tuple[Classes, Features]] = field(default_factory=dict)

    def of_model(self, layers: tuple[int, ...], classes: Classes) -> Features:
        """The mean residuals of some layers; computed once for all SAEs."""
        key = layers, id(classes)
        if key not in self._of_model:  # keeps the classes alive, or their id could be reused
            self._of_model[key] = classes, self._features(self.whole.model[layers], classes, self.dtype)
        return self._of_model[key][1]

    def of_latents(self, subject: LoadedSae, classes: Classes) -> Features:
        return self._features(self.whole.latents[subject], classes, torch.float32)

    def of_leaky_latents(self, subject: LoadedSae, classes: Classes) -> Features:
        return self._features(self.whole.leaky[subject], classes, torch.float32)

    def _features(self, matrix: csr_matrix, classes: Classes, dtype: torch.dtype) -> Features:
        rows = [self.rows[text] for texts in classes.values() for text in texts]
        return Features(csc_matrix(matrix[rows]), spans_of(classes), dtype)


def pool_task(
    context: Context, subjects: Sequence[LoadedSae], task: Task, length: int, batch_size: int, leaky: bool = False
) -> Pool:
    """Pool every text of a task, once however often it is used."""
    texts = list(dict.fromkeys(text for part in (task.train, task.test) for each in part.values() for text in each))
    layers, attention, model = layers_of(subjects), attention_of(context, subjects), context.model
    special = torch.tensor([one for one in (model.bos, model.pad, model.eos) if one is not None], device=model.device)
    size = PieceSize(batch_size_for(subjects, length, batch_size), "texts", context.say, together(subjects))

    with context.watch.stage(f"{task.name}: texts", len(texts), "texts") as advance:

        def read(start: int, stop: int) -> Piece:
            rows = make_rows(model, model.token_rows(texts[start:stop]), length)
            batch = run_windows(model, *rows, layers, attention)
            piece = read_piece(masked(batch, ~torch.isin(batch.tokens, special)), subjects, leaky)
            advance(stop - start)
            return piece

        return make_pool(texts, list(in_pieces(len(texts), size, read)), model.dtype)


def make_pool(texts: Sequence[str], pieces: Sequence[Piece], dtype: torch.dtype) -> Pool:
    first = pieces[0]
    whole = Piece(
        model={layers: stacked([piece.model[layers] for piece in pieces]) for layers in first.model},
        latents={subject: stacked([piece.latents[subject] for piece in pieces]) for subject in first.latents},
        leaky={subject: stacked([piece.leaky[subject] for piece in pieces]) for subject in first.leaky},
    )
    return Pool({text: row for row, text in enumerate(texts)}, whole, dtype)


def read_piece(batch: Windows, subjects: Sequence[LoadedSae], leaky: bool) -> Piece:
    """Mean features of the texts of a masked batch, for every SAE."""
    model, latents, leaked = {}, {}, {}
    for layers in dict.fromkeys(subject.layers for subject in subjects):
        valid_WT = valid_positions(batch, layers)
        model[layers] = to_sparse(mean_resid(batch, layers, valid_WT))
        for subject in subjects:
            if subject.layers == layers:
                acts_WTF = subject.encode(batch)
                latents[subject] = to_sparse(mean_latents(acts_WTF, valid_WT, valid_WT))
                if leaky:
                    leaked[subject] = to_sparse(mean_latents(acts_WTF, valid_WT, torch.ones_like(valid_WT)))
    return Piece(model, latents, leaked)


def masked(batch: Windows, keep: Tensor) -> Windows:
    """The batch with residuals of zero where `keep` is false."""
    resid = {layer: x * keep[..., None].to(x.dtype) for layer, x in batch.resid.items()}
    return replace(batch, keep=keep & batch.valid, resid=resid)


def valid_positions(batch: Windows, layers: Sequence[int]) -> Tensor:
    """bool [W, T]: where the residual does not sum to zero."""
    return side_by_side(batch, layers).sum(dim=-1) != 0


def mean_resid(batch: Windows, layers: Sequence[int], valid_WT: Tensor) -> Tensor:
    """[W, D] in the model's dtype."""
    return divided_by_valid(side_by_side(batch, layers).sum(dim=1), valid_WT)


def mean_latents(acts_WTF: Tensor, valid_WT: Tensor, counted_WT: Tensor) -> Tensor:
    """[W, F]: the sum over counted positions, divided by the number of valid ones."""
    total_WF = torch.einsum("wtf,wt->wf", acts_WTF, counted_WT.to(acts_WTF.dtype))
    return divided_by_valid(total_WF, valid_WT)


def divided_by_valid(total_WF: Tensor, valid_WT: Tensor) -> Tensor:
    """Sums divided by the number of valid positions; zero if there are none."""
    count_W1 = valid_WT.to(total_WF.dtype).sum(dim=1, keepdim=True)
    return torch.where(count_W1 > 0, total_WF / count_W1.clamp_min(1), 0.0)


def side_by_side(batch: Windows, layers: Sequence[int]) -> Tensor:
    """The residuals of some layers side by side, in the model's dtype."""
    return torch.cat([batch.resid[layer] for layer in layers], dim=-1)
