"""The words that were read: tokens by their number in a pass, alone and in their context.

Numbers count the kept tokens of a pass in the order they were read. Without a tokenizer a token is
written as its id.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..errors import ModelMissing
from ..model.batches import Windows
from .context import Context


class Wording:
    """Remembers the tokens of a pass."""

    def __init__(self, context: Context) -> None:
        try:
            self._tokenizer = context.tokenizer
        except ModelMissing:
            self._tokenizer = None
        self._batches: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._read = 0

    def read(self, batch: Windows) -> None:
        """The next batch of the pass."""
        place = batch.keep.nonzero().cpu()
        place[:, 0] += self._read
        self._batches.append(batch.tokens.cpu())
        self._kept.append(place)
        self._read += len(batch)

    def token(self, number: int) -> str:
        """A token's text."""
        window, position = self._place(number)
        return self.write([int(self._tokens[window, position])])

    def context(self, number: int, before: int, after: int) -> tuple[str, str, str]:
        """Text before a token in its window, its own, and after it."""
        window, position = self._place(number)
        row = self._tokens[window].tolist()
        parts = row[max(0, position - before) : position], row[position : position + 1], row[position + 1 :][:after]
        left, own, right = (self.write(part) for part in parts)
        return left, own, right

    def write(self, ids: Sequence[int]) -> str:
        """Text of some tokens in a row."""
        if self._tokenizer is None:
            return " ".join(f"<{number}>" for number in ids)
        return self._tokenizer.backend.decode(list(ids), skip_special_tokens=False)

    def _place(self, number: int) -> tuple[int, int]:
        window, position = self._places[number].tolist()
        return window, position

    @cached_property
    def _places(self) -> Tensor:
        """int64 [N, 2]: window and position; asked for when the pass is over."""
        return torch.cat(self._kept)

    @cached_property
    def _tokens(self) -> Tensor:
        return torch.cat(self._batches)
