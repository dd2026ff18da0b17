"""What an unlearning evaluation is made of: a text to forget, a text to retain, and exams on both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...model.lm import LanguageModel
from .papers import Paper
from .sweep import Sweep


@dataclass(frozen=True, eq=False)
class Material:
    """Texts as rows of tokens, and papers; the model that is asked may be another than the store's."""

    name: str
    model_name: str
    model: LanguageModel
    forget_rows: Tensor  # int64 [rows, T]
    retain_rows: Tensor
    forget: Sequence[Paper]
    retain: Sequence[Paper]
    sweep: Sweep
    """What is tried unless the settings say otherwise."""

    @property
    def papers(self) -> tuple[Paper, ...]:
        return (*self.forget, *self.retain)
