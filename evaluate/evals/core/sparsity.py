"""The second block of rows: how sparse SAEs are and how well they reconstruct. Needs no model.

N SAEs share each batch. W windows, T positions, N kept tokens, F latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...context.context import Context
from ...context.loaded_sae import LoadedSae, attention_layers_of, layers_of
from ...context.ordinary_rows import ordinary_rows
from ...model.memory import PieceSize, in_pieces
from ...model.windows import Windows
from .blocks import Block, read_block
from .bootstrap import DocumentSums
from .encoding import encode_kept
from .quality import Firing, Tally, Tokens, measure_tokens

PIECE_BYTES = 1 << 27  # of activations at once


@dataclass
class Sparsity:
    """What the second block says about one SAE."""

    firing: Firing
    tally: Tally = field(default_factory=Tally)  # of all tokens, as SAEBench has it
    ordinary: Tally = field(default_factory=Tally)  # of those that are not massive, as `documents`
    documents: DocumentSums = field(default_factory=DocumentSums)

    def add(self, tokens: Tokens, x_ND: Tensor, batch: Windows, ordinary_WT: Tensor) -> None:
        """One batch."""
        self.tally.add(tokens, x_ND.double().sum(dim=0))
        is_ordinary = ordinary_WT[batch.keep]
        tokens = tokens.where(is_ordinary)
        self.ordinary.add(tokens, x_ND[is_ordinary].double().sum(dim=0))
        if batch.documents is not None:
            values = {"tokens": torch.ones_like(tokens.l0), "l0": tokens.l0, "cosine": tokens.cosine}
            values |= {"error": tokens.error, "square": tokens.square}
            self.documents.add(
                batch.documents[ordinary_WT].cpu().numpy(), {k: v.double().cpu().numpy() for k, v in values.items()}
            )


def measure_sparsity(context: Context, subjects: Sequence[LoadedSae], block: Block) -> dict[LoadedSae, Sparsity]:
    """One pass over the block for all SAEs."""
    found = {subject: Sparsity(Firing.none(subject.width, context.device)) for subject in subjects}
    sizes = {subject: piece_size(context, subject, block.batch_windows) for subject in subjects}
    length = context.manifest.context
    with context.watch.stage("sparsity and variance", block.windows * length) as advance:
        for batch in read_block(context, block, layers_of(subjects), attention_layers_of(subjects)):
            for subject, sparsity in found.items():
                ordinary_WT = ordinary_rows(context, subject, batch)
                _add_batch(sparsity, subject, batch, ordinary_WT, sizes[subject])
            advance(len(batch) * length)
    return found


def piece_size(context: Context, subject: LoadedSae, batch_windows: int) -> PieceSize:
    """As many windows as have activations of `PIECE_BYTES`."""
    room = PIECE_BYTES // (4 * context.manifest.context * subject.width)
    return PieceSize(min(max(1, room), batch_windows), "windows", context.say)


@torch.inference_mode()
def _add_batch(sparsity: Sparsity, subject: LoadedSae, batch: Windows, ordinary_WT: Tensor, size: PieceSize) -> None:
    x_WTD = batch.x(subject.target_layers)
    x_ND = x_WTD[batch.keep]
    mean_D = (x_ND.double().sum(dim=0) / batch.keep.sum().clamp_min(1)).float()

    def work(start: int, stop: int) -> tuple[Tokens, Tensor, Tensor]:
        piece = batch.slice(start, stop)
        encoded = encode_kept(subject, piece)
        tokens = measure_tokens(encoded.l0, encoded.l1, x_WTD[start:stop][piece.keep], encoded.x_hat, mean_D)
        window = piece.keep.nonzero()[:, 0]
        return tokens, encoded.fired(), encoded.fired_in(window, len(piece))

    pieces = list(in_pieces(len(batch), size, work))
    for tokens, in_tokens, in_windows in pieces:
        sparsity.firing.add(in_tokens, in_windows, len(tokens.l0))
    sparsity.add(Tokens.concat([piece[0] for piece in pieces]), x_ND, batch, ordinary_WT)
