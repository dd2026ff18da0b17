"""Rows of tokens in order: what SAEBench's core evaluation asks of an activation store, and no more."""

from __future__ import annotations

import torch


class TokenRows:
    """Hands out the rows of a table."""

    def __init__(self, rows: torch.Tensor, batch: int) -> None:
        self._rows, self._at = rows, 0
        self.context_size = rows.shape[1]
        self.store_batch_size_prompts = batch

    def get_batch_tokens(self, count: int) -> torch.Tensor:
        self._at += count
        return self._rows[self._at - count : self._at]

    def reset_input_dataset(self) -> None:
        """The official one starts its data set anew, but goes on with the sequences that it is making."""
