"""Which questions a model knows, remembered between runs: 24 orders of every question take longer than all SAEs."""

from __future__ import annotations

from pathlib import Path

from ...context.disk_cache import decided_by, model_print, remembered
from ...model.lm import LanguageModel
from .marking import known_questions
from .papers import ChoicePaper, Paper


def remembered_questions(model: LanguageModel, paper: Paper, folder: Path) -> list[int]:
    """The numbers of the questions that the model knows, of multiple choice computed at most once."""
    if not isinstance(paper, ChoicePaper):
        return known_questions(model, paper)
    questions = [(question.prompt(), question.answer) for question in paper.questions]
    decided = decided_by(model=model_print(model), questions=questions)
    return remembered(folder, paper.name, decided, lambda: known_questions(model, paper))
