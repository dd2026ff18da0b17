"""Where exams come from: a paper knows all its questions, and sets the exam of those that the model can answer.

A question counts only if the model answers it right undisturbed. Multiple choice must be answered right with
its choices in every order; the exam then has them as they are written. Plain text asks each token once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Protocol

import torch
from torch import Tensor

from ...errors import DataMissing
from ...model.prefix_suffix import LanguageModel
from .exam import Exam, letter_sheets, letters_chosen, most_likely, next_token_sheets

LETTERS = "ABCD"
ALL_ORDERS = tuple(permutations(range(len(LETTERS))))
AS_WRITTEN = (0, 1, 2, 3)
TEMPLATE = "<bos><start_of_turn>user\n{body}<end_of_turn>\n<start_of_turn>model\nAnswer: ("
INTRODUCTION = "The following are multiple choice questions (with answers) about {subject}.\n"
SPELLINGS = ("", " ")
"""An answer is a letter alone, or one after a space."""


@dataclass(frozen=True)
class Question:
    """A question of a data set, its four choices and the index of the right one."""

    subject: str
    text: str
    choices: tuple[str, ...]
    answer: int

    def prompt(self, order: Sequence[int] = AS_WRITTEN) -> str:
        """The prompt with the choices in this order."""
        listed = "".join(f"\n{letter}. {self.choices[i]}" for letter, i in zip(LETTERS, order, strict=True))
        return TEMPLATE.format(body=INTRODUCTION.format(subject=self.subject) + self.text + listed)

    def right_letter(self, order: Sequence[int] = AS_WRITTEN) -> int:
        """Which letter stands for the right choice in this order."""
        return order.index(self.answer)


class Paper(Protocol):
    """A set of questions about one subject."""

    @property
    def name(self) -> str: ...

    @property
    def orders(self) -> int:
        """How often the trial asks each question."""
        ...

    def trial(self) -> Exam:
        """All questions, the orders of each one after the other."""
        ...

    def exam(self, numbers: Sequence[int]) -> Exam:
        """The questions of these numbers, once each."""
        ...


@dataclass(frozen=True, eq=False)
class ChoicePaper:
    """Multiple choice, for a model that follows instructions."""

    name: str
    questions: Sequence[Question]
    model: LanguageModel
    batch_size: int
    orders: int = len(ALL_ORDERS)

    def trial(self) -> Exam:
        return self._exam(self.questions, ALL_ORDERS)

    def exam(self, numbers: Sequence[int]) -> Exam:
        return self._exam([self.questions[number] for number in numbers], (AS_WRITTEN,))

    def _exam(self, questions: Sequence[Question], orders: Sequence[Sequence[int]]) -> Exam:
        asked = [(question, order) for question in questions for order in orders]
        rows = self.model.tokenizer.encode([question.prompt(order) for question, order in asked])
        answers = [question.right_letter(order) for question, order in asked]
        sheets = letter_sheets(rows, answers, self.model.pad, self.batch_size)
        return Exam(self.name, tuple(sheets), letters_chosen(letter_tokens(self.model), self.model.dtype))


@dataclass(frozen=True, eq=False)
class TextPaper:
    """Every next token of rows of plain text, for any model."""

    name: str
    rows: Tensor  # int64 [rows, T], BOS first
    special: Sequence[int]
    batch_size: int
    orders: int = 1

    def trial(self) -> Exam:
        return Exam(self.name, tuple(next_token_sheets(self.rows, self.special, self.batch_size)), most_likely)

    def exam(self, numbers: Sequence[int]) -> Exam:
        whole = self.trial()
        chosen = torch.zeros(len(whole), dtype=torch.bool)
        chosen[torch.tensor(numbers, dtype=torch.int64)] = True
        return whole.only(chosen.split([len(sheet) for sheet in whole.sheets]))


def letter_tokens(model: LanguageModel) -> Tensor:
    """int64 [spellings, letters]: each must be one token."""
    spelled = [[f"{before}{letter}" for letter in LETTERS] for before in SPELLINGS]
    ids = [model.tokenizer.encode(letters) for letters in spelled]
    if any(len(token) != 1 for letters in ids for token in letters):
        raise DataMissing("this tokenizer splits the letters A to D: multiple choice needs one token for each")
    return torch.tensor(ids, device=model.device)[..., 0]
