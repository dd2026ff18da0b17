"""Multiple-choice questions as the instruction-tuned model is asked them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

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
