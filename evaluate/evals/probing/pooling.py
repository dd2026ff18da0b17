"""Activations averaged over each text: the model reads every text once, and every SAE encodes that.

1. Special tokens (BOS, EOS, padding) are set to zero in the residual.
2. A position is valid when its residual does not sum to zero; features are averaged over valid positions.
   A text without any has features of zero.
3. An SAE encodes all positions, zeroed ones too. `latents` leave those out. `leaky` keeps them, divided by the
   number of valid ones: SAEBench's ablations never mask them again, so a latent that fires on
   a zero vector counts once for every padding token.

W texts of a batch, T positions, D residual width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from scipy.sparse import csc_matrix, csr_matrix
from torch import Tensor

from ...context.context import Context
from ...context.loaded_sae import LoadedSae, batch_size_for, layers_of, together
from ...context.prompt_positions import stacked, to_sparse
from ...context.usable_saes import attention_of
from ...model.batches import Windows, make_rows, run_windows
from ...model.prefix_suffix import LanguageModel
from ...model.smaller_pieces import PieceSize, in_pieces
from .draw_classes import Classes, Task
from .features import Features, spans_of


@dataclass(frozen=True, eq=False)
class Piece:
    """What some texts give: the model's mean residuals by layers, mean latents by SAE. float32 [W, features]."""

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
    """Pool every text of a task, each once however often it is used."""
    texts = list(dict.fromkeys(text for part in (task.train, task.test) for each in part.values() for text in each))
    layers, attention = layers_of(subjects), attention_of(context, subjects)
    size = PieceSize(batch_size_for(subjects, length, batch_size), "texts", context.say, together(subjects))

    with context.watch.stage(f"{task.name}: texts", len(texts), "texts") as advance:

        def read(start: int, stop: int) -> Piece:
            rows = make_rows(context.model, texts[start:stop], length)
            batch = run_windows(context.model, *rows, layers, attention)
            piece = read_piece(without_special(context.model, batch), subjects, leaky)
            advance(stop - start)
            return piece

        return make_pool(texts, list(in_pieces(len(texts), size, read)), context.model.dtype)


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


def without_special(model: LanguageModel, batch: Windows) -> Windows:
    """The batch with residuals of BOS, EOS and padding set to zero."""
    special = {model.bos, model.pad, *(() if model.eos is None else (model.eos,))}
    return masked(batch, ~torch.isin(batch.tokens, torch.tensor(sorted(special), device=batch.tokens.device)))


def masked(batch: Windows, keep: Tensor) -> Windows:
    """The batch with residuals of zero where `keep` is false."""
    resid = {layer: x * keep[..., None].to(x.dtype) for layer, x in batch.resid.items()}
    return replace(batch, keep=keep & batch.valid, resid=resid)


def valid_positions(batch: Windows, layers: Sequence[int]) -> Tensor:
    """bool [W, T]: where the residual does not sum to zero."""
    return beside(batch, layers).sum(dim=-1) != 0


def mean_resid(batch: Windows, layers: Sequence[int], valid_WT: Tensor) -> Tensor:
    """[W, D] in the model's dtype."""
    x_WTD = beside(batch, layers)
    return by_count(x_WTD.sum(dim=1), valid_WT)


def mean_latents(acts_WTF: Tensor, valid_WT: Tensor, counted_WT: Tensor) -> Tensor:
    """[W, F]: the sum over counted positions, divided by the number of valid ones."""
    total_WF = torch.einsum("wtf,wt->wf", acts_WTF, counted_WT.to(acts_WTF.dtype))
    return by_count(total_WF, valid_WT)


def by_count(total_WF: Tensor, valid_WT: Tensor) -> Tensor:
    """Sums divided by the number of valid positions; zero if there are none."""
    count_W1 = valid_WT.to(total_WF.dtype).sum(dim=1, keepdim=True)
    return torch.where(count_W1 > 0, total_WF / count_W1.clamp_min(1), 0.0)


def beside(batch: Windows, layers: Sequence[int]) -> Tensor:
    """The residuals of some layers side by side, in the model's dtype."""
    return torch.cat([batch.resid[layer] for layer in layers], dim=-1)
