"""Which token rows a core evaluation reads: two consecutive blocks of batches of a split.

The first block is for the model's losses, the second for sparsity and variance. SAEBench takes 200 and 2,000 batches; a
smaller split is divided in the same ratio of one to ten, but the losses get up to 20 batches, or half of all, if their
share would be too small to say anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...context.context import Context
from ...errors import NotApplicable, SettingInvalid
from ...model.batches import Windows, store_batches
from ...model.smaller_pieces import PieceSize, in_pieces

RECONSTRUCTION, SPARSITY = 200, 2000
ENOUGH = 20  # batches for the losses


@dataclass(frozen=True)
class Block:
    """Consecutive batches of a split."""

    split: str
    batch_windows: int
    first: int  # window
    batches: int

    @property
    def windows(self) -> int:
        return self.batches * self.batch_windows


class Rows(NamedTuple):
    reconstruction: Block
    sparsity: Block


def choose_rows(windows: int, split: str, batch_windows: int, reconstruction: int | None, sparsity: int | None) -> Rows:
    """The requested blocks; for None, SAEBench's or what the split has room for."""
    if windows < 2:
        raise NotApplicable(
            f"the {split} split has {windows} windows, but the two blocks of rows need one each: harvest more "
            "text, or name another split"
        )
    batch_windows = min(batch_windows, windows // 2)
    batches = windows // batch_windows
    if reconstruction is None:
        room = batches - (sparsity or 0)
        reconstruction = max(1, min(RECONSTRUCTION, max(batches // 11, min(batches // 2, ENOUGH)), room))
    if sparsity is None:
        sparsity = max(1, min(SPARSITY, batches - reconstruction))
    if min(reconstruction, sparsity) < 1 or reconstruction + sparsity > batches:
        raise SettingInvalid(
            f"asked for {reconstruction} and {sparsity} batches of {batch_windows} windows (at least one each), but "
            f"the {split} split has {batches}: ask for fewer, or set a smaller batch_size_prompts"
        )
    first = Block(split, batch_windows, 0, reconstruction)
    return Rows(first, Block(split, batch_windows, first.windows, sparsity))


def read_block(
    context: Context, block: Block, layers: Sequence[int], attention_layers: Sequence[int] = ()
) -> Iterator[Windows]:
    """The batches of a block; residuals are read from the store, or computed from its tokens."""
    batches = store_batches(
        context.store,
        block.split,
        () if context.from_tokens else layers,
        attention_layers,
        block.batch_windows,
        block.first,
        block.windows,
        context.device,
    )
    size = PieceSize(block.batch_windows, "windows", context.say)
    for batch in batches:
        yield replace(batch, resid=_resid_of(context, batch, layers, size)) if context.from_tokens else batch


def _resid_of(context: Context, batch: Windows, layers: Sequence[int], size: PieceSize) -> dict[int, Tensor]:
    """The residuals of a batch, computed from its tokens; its pieces are freed when it returns."""
    pieces = list(in_pieces(len(batch), size, lambda a, b: context.model.resid(batch.tokens[a:b], layers)))
    return {layer: torch.cat([piece[layer] for piece in pieces]) for layer in layers}
