"""What an unlearning evaluation is made of: a text to forget, a text to retain, and exams on both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...errors import DataMissing
from ...model.prefix_suffix import LanguageModel
from .papers import Paper
from .sweep import Sweep

CHUNKS = 20
"""The joined text is cut into so many strings before it is tokenised, wherever the cut falls."""


class Encodes(Protocol):
    """What of a tokenizer is used: ids without BOS, special tokens in the text recognised."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...


def joined_rows(texts: Sequence[str], encoder: Encodes, eos_text: str, bos: int, pad: int, length: int) -> Tensor:
    """int64 [rows, length]. Every chunk starts with BOS, and so does every row, in the place of its first token."""
    whole = eos_text.join(texts)
    size = (len(whole) - 1) // CHUNKS + 1
    chunks = [whole[start : start + size] for start in range(0, CHUNKS * size, size)]
    ids = [token for chunk in encoder.encode(chunks) for token in (bos, *chunk) if token != pad]
    rows = torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)
    rows[:, 0] = bos
    return rows


def sampled_texts(texts: Sequence[str], number: int, draw: random.Random) -> list[str]:
    """At most `number` of the texts, in random order."""
    return draw.sample(list(texts), min(number, len(texts)))


def shuffled_rows(rows: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """At most `number` of the rows, in random order."""
    return rows[torch.randperm(len(rows), generator=generator)][:number]


def eos_text(model: LanguageModel) -> str:
    """How EOS is written in text."""
    if model.eos is None:
        raise DataMissing("the model's tokenizer has no EOS token, which joins the documents")
    return model.tokenizer.backend.id_to_token(model.eos)


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
