"""Which questions a model knows, remembered between runs: 24 orders of every question take longer than all SAEs.

One JSON file for each paper in a folder of the cache, named for all that decides it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ...train.files import replace_file
from ..lm import LanguageModel
from .marking import known_questions
from .papers import ChoicePaper, Paper


def remembered_questions(model: LanguageModel, paper: Paper, folder: Path) -> list[int]:
    """The numbers of the questions that the model knows, computed at most once."""
    if not isinstance(paper, ChoicePaper):
        return known_questions(model, paper)
    file = folder / f"{paper.name}-{_digest(model, paper)}.json"
    if file.is_file():
        return json.loads(file.read_text())["questions"]
    numbers = known_questions(model, paper)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps({"questions": numbers}).encode())
    return numbers


def _digest(model: LanguageModel, paper: ChoicePaper) -> str:
    """Of the questions, and of the model as far as it shows: its tokenizer, dtype and a row of its weights."""
    total = hashlib.sha256(model.tokenizer.digest.encode())
    total.update(str(model.dtype).encode())
    total.update(_weights_print(model))
    total.update("".join(question.prompt() for question in paper.questions).encode())
    return total.hexdigest()[:16]


def _weights_print(model: LanguageModel) -> bytes:
    """The sum of every parameter: cheap, and another checkpoint of the same shape has others."""
    sums: Sequence[float] = [float(parameter.float().sum()) for parameter in model.stack.parameters()]
    return json.dumps(sums).encode()
