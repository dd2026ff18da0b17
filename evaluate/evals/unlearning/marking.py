"""Marking exams: which questions a model answers right, undisturbed or under an intervention.

Which it knows undisturbed is remembered between runs: 24 orders of every question take longer than all SAEs.

W rows, T tokens, D width, N questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...context.disk_cache import decided_by, model_print, remembered
from ...model.prefix_suffix import LanguageModel
from .exam import Choose, Exam, Sheet
from .papers import ChoicePaper, Paper

CHUNK = 256
"""Questions whose logits are held at once."""


def right_answers(model: LanguageModel, hidden_WTD: Tensor, sheet: Sheet, choose: Choose) -> Tensor:
    """bool [N]: the model's choice at each question is the right one."""
    asked = sheet.asked(hidden_WTD).split(CHUNK)
    chosen = torch.cat([choose(model.head(rows)) for rows in asked])
    return chosen == sheet.answers


def known_questions(model: LanguageModel, paper: Paper) -> list[int]:
    """The numbers of the questions that the undisturbed model answers right in every order."""
    right = torch.cat([right.cpu() for right in _trial_answers(model, paper.trial())])
    return right.view(-1, paper.orders).all(1).nonzero().view(-1).tolist()


def valid_tokens(sheet: Sheet) -> Tensor:
    """bool [W, T]: positions up to the last question of each row; behind it is padding, or nothing to ask."""
    last = sheet.tokens.new_zeros(len(sheet.tokens)).scatter_reduce_(0, sheet.rows, sheet.positions, "amax")
    return torch.arange(sheet.tokens.shape[1], device=last.device) <= last[:, None]


def count(exams: Sequence[Exam]) -> int:
    return sum(len(exam) for exam in exams)


def _trial_answers(model: LanguageModel, exam: Exam) -> Iterator[Tensor]:
    for sheet in (sheet.to(model.device) for sheet in exam.sheets):
        yield right_answers(model, model.hidden(sheet.tokens), sheet, exam.choose)


def remembered_questions(model: LanguageModel, paper: Paper, folder: Path) -> list[int]:
    """The numbers of the questions that the model knows, of multiple choice computed at most once."""
    if not isinstance(paper, ChoicePaper):
        return known_questions(model, paper)
    questions = [(question.prompt(), question.answer) for question in paper.questions]
    decided = decided_by(model=model_print(model), questions=questions)
    return remembered(folder, paper.name, decided, lambda: known_questions(model, paper))
