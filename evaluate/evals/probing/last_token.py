"""Activations at the last token of each prompt: the model reads every prompt once for all SAEs.

A prompt that is too long loses its beginning, never its last token. N prompts, D residual width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from ...context.compatible import attention_of
from ...context.context import Context
from ...context.loaded_sae import LoadedSae, layers_of
from ...model.batches import make_rows, run_windows
from ...model.memory import PieceSize, in_pieces
from ...model.prefix_suffix import LanguageModel
from ...model.windows import Windows
from .pooling import batch_size_for, beside, stacked, to_sparse


@dataclass(frozen=True, eq=False)
class LastTokens:
    """By the prompts' order."""

    resid: Mapping[tuple[int, ...], np.ndarray]  # float32 [N, D], by layers
    latents: Mapping[LoadedSae, csr_matrix]  # float32 [N, F]


def read_prompts(
    context: Context, subjects: Sequence[LoadedSae], title: str, prompts: Sequence[str], length: int, batch_size: int
) -> LastTokens:
    """Run the model on prompts of like length together, and put its activations back into their order."""
    rows = token_rows(context.model, prompts, length)
    order = np.argsort([len(row) for row in rows], kind="stable")
    size = PieceSize(batch_size_for(subjects, length, batch_size), "prompts", context.say)

    with context.watch.stage(title, len(rows), "prompts") as advance:

        def read(start: int, stop: int) -> LastTokens:
            piece = read_last(_run(context, subjects, [rows[row] for row in order[start:stop]]), subjects)
            advance(stop - start)
            return piece

        pieces = list(in_pieces(len(rows), size, read))
    back = np.argsort(order)
    return LastTokens(
        {layers: np.concatenate([piece.resid[layers] for piece in pieces])[back] for layers in pieces[0].resid},
        {subject: stacked([piece.latents[subject] for piece in pieces])[back] for subject in subjects},
    )


def read_last(batch: Windows, subjects: Sequence[LoadedSae]) -> LastTokens:
    """Activations at the last token of the prompts of a batch."""
    last = at_last(batch)
    groups = dict.fromkeys(subject.layers for subject in subjects)
    return LastTokens(
        {layers: beside(last, layers)[:, 0].float().cpu().numpy() for layers in groups},
        {subject: to_sparse(latents_at_last(subject, batch, last)) for subject in subjects},
    )


def token_rows(model: LanguageModel, prompts: Sequence[str], context: int) -> list[list[int]]:
    """BOS and the last tokens of each prompt, `context` in all."""
    return [[model.bos, *ids[-(context - 1) :]] for ids in model.tokenizer.encode(prompts)]


def at_last(batch: Windows) -> Windows:
    """Windows of one position: the last of each prompt."""
    rows, last = torch.arange(len(batch), device=batch.tokens.device), batch.valid.sum(dim=1) - 1
    one = torch.ones(len(batch), 1, dtype=torch.bool, device=batch.tokens.device)
    resid = {layer: x[rows, last][:, None] for layer, x in batch.resid.items()}
    return Windows(tokens=batch.tokens[rows, last][:, None], keep=one, valid=one, resid=resid)


def latents_at_last(subject: LoadedSae, batch: Windows, last: Windows) -> Tensor:
    """[W, F]; an SAE that reads more than the residual sees the whole prompt."""
    if not subject.needs:
        return subject.encode(last)[:, 0]
    rows = torch.arange(len(batch), device=batch.tokens.device)
    return subject.encode(batch)[rows, batch.valid.sum(dim=1) - 1]


def _run(context: Context, subjects: Sequence[LoadedSae], rows: Sequence[Sequence[int]]) -> Windows:
    tokens, valid = make_rows(context.model, rows, max(map(len, rows)))
    return run_windows(context.model, tokens, valid, layers_of(subjects), attention_of(context, subjects))
