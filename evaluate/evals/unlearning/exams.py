"""Exams and their papers: a paper has all its questions, and sets an exam of those that the model can answer.

A question counts only if the undisturbed model answers it correctly. For multiple choice it must do so with the choices
in every order; the exam then has them as they are written. Plain text asks for each token once.

An exam consists of rows of tokens, the positions where the model must choose, and the right choices.

N questions, W rows, T tokens, V vocabulary. A question is one position of one row, and the model's logits there decide.
There are two kinds: letters of multiple choice (`letters_chosen`), and the next token of plain text (`most_likely`),
which also works for a model without instruction tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from ...errors import DataMissing
from ...model.prefix_suffix import LanguageModel

Choose = Callable[[Tensor], Tensor]
"""Logits [N, V] to the index of the choice [N]."""
LETTERS = "ABCD"
ALL_ORDERS = tuple(permutations(range(len(LETTERS))))
AS_WRITTEN = (0, 1, 2, 3)
TEMPLATE = "<bos><start_of_turn>user\n{body}<end_of_turn>\n<start_of_turn>model\nAnswer: ("
INTRODUCTION = "The following are multiple choice questions (with answers) about {subject}.\n"


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

    def to(self, device: torch.device | str) -> Sheet:
        return Sheet(*(part.to(device) for part in vars(self).values()))


@dataclass(frozen=True, eq=False)
class Exam:
    """Questions of one kind about one subject."""

    name: str
    sheets: tuple[Sheet, ...]
    choose: Choose

    def __len__(self) -> int:
        return sum(len(sheet) for sheet in self.sheets)

    @property
    def longest(self) -> int:
        """The length of its longest row, in tokens."""
        return max((sheet.tokens.shape[1] for sheet in self.sheets), default=0)

    def only(self, chosen: Sequence[Tensor]) -> Exam:
        """The same with some of the questions of each sheet; sheets left empty are dropped."""
        sheets = tuple(sheet.only(mask) for sheet, mask in zip(self.sheets, chosen, strict=True) if bool(mask.any()))
        return Exam(self.name, sheets, self.choose)


def letters_chosen(letter_tokens: Tensor, dtype: torch.dtype) -> Choose:
    """The letter with the highest probability in any of its spellings: `letter_tokens` is [spellings, letters].

    As in SAEBench, probabilities are in the model's dtype: in bfloat16 they can tie, and the first letter wins.
    """

    def choose(logits_NV: Tensor) -> Tensor:
        p_NV = logits_NV.to(dtype).softmax(-1)
        return p_NV[:, letter_tokens].amax(1).argmax(-1)

    return choose


def most_likely(logits_NV: Tensor) -> Tensor:
    return logits_NV.argmax(-1)


def letter_sheets(rows: Sequence[list[int]], answers: Sequence[int], pad: int, batch_size: int) -> Iterator[Sheet]:
    """Sheets of prompts that are answered after their last token."""
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        longest = max(map(len, batch))
        yield Sheet(
            tokens=torch.tensor([row + [pad] * (longest - len(row)) for row in batch]),
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


@dataclass(frozen=True)
class Question:
    """A question of a data set, its four choices and the index of the right one."""

    subject: str
    text: str
    choices: tuple[str, ...]
    answer: int

    def prompt(self, order: Sequence[int] = AS_WRITTEN) -> str:
        listed = "".join(f"\n{letter}. {self.choices[i]}" for letter, i in zip(LETTERS, order, strict=True))
        return TEMPLATE.format(body=INTRODUCTION.format(subject=self.subject) + self.text + listed)


@dataclass(frozen=True, eq=False)
class ChoicePaper:
    """Multiple choice, for a model that follows instructions."""

    name: str
    questions: Sequence[Question]
    model: LanguageModel
    batch_size: int
    orders = len(ALL_ORDERS)  # in which the trial asks each question

    def trial(self) -> Exam:
        """All questions, each in every order in turn."""
        return self._exam(self.questions, ALL_ORDERS)

    def exam(self, numbers: Sequence[int]) -> Exam:
        """The questions with these numbers, once each."""
        return self._exam([self.questions[number] for number in numbers], (AS_WRITTEN,))

    def _exam(self, questions: Sequence[Question], orders: Sequence[Sequence[int]]) -> Exam:
        asked = [(question, order) for question in questions for order in orders]
        rows = self.model.tokenizer.encode([question.prompt(order) for question, order in asked])
        answers = [order.index(question.answer) for question, order in asked]
        sheets = letter_sheets(rows, answers, self.model.pad, self.batch_size)
        return Exam(self.name, tuple(sheets), letters_chosen(letter_tokens(self.model), self.model.dtype))


@dataclass(frozen=True, eq=False)
class TextPaper:
    """Every next token of rows of plain text, for any model."""

    name: str
    rows: Tensor  # int64 [rows, T], BOS first
    special: Sequence[int]
    batch_size: int
    orders = 1

    def trial(self) -> Exam:
        return Exam(self.name, tuple(next_token_sheets(self.rows, self.special, self.batch_size)), most_likely)

    def exam(self, numbers: Sequence[int]) -> Exam:
        whole = self.trial()
        chosen = torch.zeros(len(whole), dtype=torch.bool)
        chosen[torch.tensor(numbers, dtype=torch.int64)] = True
        return whole.only(chosen.split([len(sheet) for sheet in whole.sheets]))


Paper = ChoicePaper | TextPaper
"""A set of questions about one subject."""


def letter_tokens(model: LanguageModel) -> Tensor:
    """int64 [spellings, letters]: a letter alone, or one after a space; each must be one token."""
    spelled = [[f"{before}{letter}" for letter in LETTERS] for before in ("", " ")]
    ids = [model.tokenizer.encode(letters) for letters in spelled]
    if any(len(token) != 1 for letters in ids for token in letters):
        raise DataMissing(
            "this tokenizer splits the letters A to D, but multiple choice needs one token for each: use "
            "--set unlearning.data=stdlib, or another model"
        )
    return torch.tensor(ids, device=model.device)[..., 0]
