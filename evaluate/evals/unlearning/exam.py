"""An exam: places in rows of tokens where the model must choose, and what is right there.

N questions, W rows, T tokens, V vocabulary. A question is one position of one row; the model's logits
there decide. Two kinds: letters of multiple choice (`letters_chosen`), and the next token of plain text
(`most_likely`), which a model without instruction tuning can be asked too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Choose = Callable[[Tensor], Tensor]
"""Logits [N, V] to the index of the choice [N]."""


@dataclass(frozen=True, eq=False)
class Sheet:
    """A batch of rows with questions in them."""

    tokens: Tensor  # int64 [W, T], padded on the right
    rows: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    answers: Tensor  # int64 [N]

    def __len__(self) -> int:
        return len(self.answers)

    def only(self, chosen: Tensor) -> Sheet:
        """The same with some of the questions (bool [N])."""
        return Sheet(self.tokens, self.rows[chosen], self.positions[chosen], self.answers[chosen])

    def part(self, start: int, stop: int) -> Sheet:
        """Some of the rows, with their questions."""
        inside = (self.rows >= start) & (self.rows < stop)
        return Sheet(self.tokens[start:stop], self.rows[inside] - start, self.positions[inside], self.answers[inside])

    def asked(self, hidden: Tensor) -> Tensor:
        """The hidden states [N, D] of [W, T, D] at the questions."""
        return hidden[self.rows, self.positions]

    def to(self, device: torch.device | str) -> Sheet:
        parts = (self.tokens, self.rows, self.positions, self.answers)
        return Sheet(*(part.to(device) for part in parts))


@dataclass(frozen=True, eq=False)
class Exam:
    """Questions of one kind about one subject."""

    name: str
    sheets: tuple[Sheet, ...]
    choose: Choose

    def __len__(self) -> int:
        return sum(len(sheet) for sheet in self.sheets)

    def only(self, chosen: Sequence[Tensor]) -> Exam:
        """The same with some of the questions of each sheet; sheets left empty are dropped."""
        sheets = tuple(sheet.only(mask) for sheet, mask in zip(self.sheets, chosen, strict=True) if bool(mask.any()))
        return Exam(self.name, sheets, self.choose)


def letters_chosen(letter_tokens: Tensor, dtype: torch.dtype) -> Choose:
    """The letter with the highest probability in any of its spellings: `letter_tokens` is [spellings, letters].

    Probabilities are taken in the model's dtype, as SAEBench does: in bfloat16 they can tie, and the first wins.
    """

    def choose(logits_NV: Tensor) -> Tensor:
        p_NV = logits_NV.to(dtype).softmax(-1)
        return p_NV[:, letter_tokens].amax(1).argmax(-1)

    return choose


def most_likely(logits_NV: Tensor) -> Tensor:
    """The next token, greedily."""
    return logits_NV.argmax(-1)


def letter_sheets(rows: Sequence[list[int]], answers: Sequence[int], pad: int, batch_size: int) -> Iterator[Sheet]:
    """Sheets of prompts that are answered after their last token."""
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        yield Sheet(
            tokens=padded_right(batch, pad),
            rows=torch.arange(len(batch)),
            positions=torch.tensor([len(row) - 1 for row in batch]),
            answers=torch.tensor(answers[start : start + batch_size]),
        )


def next_token_sheets(rows_WT: Tensor, special: Sequence[int], batch_size: int) -> Iterator[Sheet]:
    """Sheets that ask for every next token that is not special."""
    special_tokens = torch.tensor(special, dtype=rows_WT.dtype)
    for tokens in rows_WT.split(batch_size):
        targets = tokens[:, 1:]
        rows, positions = (~torch.isin(targets, special_tokens)).nonzero(as_tuple=True)
        yield Sheet(tokens, rows, positions, targets[rows, positions])


def padded_right(rows: Sequence[list[int]], pad: int) -> Tensor:
    """int64 [rows, longest]."""
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
