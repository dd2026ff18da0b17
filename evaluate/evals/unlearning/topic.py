"""A topic to forget without a download: one package of the standard library, beside all the others.

1. Documents of the topic and documents of the rest, read where this Python is installed.
2. Of each, every third is set aside for the exam: latents are chosen on the others.
3. The exam asks for next tokens (`TextPaper`), because a small base model answers no questions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ....harvest.pocket.text import stdlib_documents
from ...errors import DataMissing
from ...model.prefix_suffix import LanguageModel
from .material import Material, eos_text, joined_rows, shuffled_rows
from .papers import TextPaper
from .sweep import Sweep

TEXT_ROWS, EXAM_ROWS = 48, 24
MAX_LENGTH = 128
TEXTS = 120
"""Documents of each kind that are read at most."""
EXAM_SHARE = 3
SWEEP = Sweep(retain_thresholds=(0.01, 0.05), num_latents=(5, 20), multipliers=(1, 2, 5, 10))
"""Gentler than SAEBench's, whose multipliers are made for the residuals of Gemma-2-2b, and laxer about text that is
not the topic's: all of the library is code."""
BATCH_ROWS = 8


def load_topic(model: LanguageModel, model_name: str, topic: str, seed: int) -> Material:
    """Forget the documents under `topic` (a folder of the library), retain the rest."""
    names_and_texts = list(stdlib_documents())
    inside = [text for name, text in names_and_texts if name.startswith(f"{topic}/")]
    outside = [text for name, text in names_and_texts if not name.startswith(f"{topic}/")]
    if len(inside) < 2 * EXAM_SHARE:
        raise DataMissing(
            f"expected a package of the standard library with at least {2 * EXAM_SHARE} files, found {len(inside)} "
            f"under {topic!r}: give another by --set unlearning.topic=NAME, for example asyncio, email or xml"
        )
    return make_material(model, model_name, inside, outside, topic, seed)


def make_material(
    model: LanguageModel,
    model_name: str,
    inside: Sequence[str],
    outside: Sequence[str],
    topic: str,
    seed: int,
) -> Material:
    """Material of two lists of texts."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    drawn = [draw.sample(list(texts), min(TEXTS, len(texts))) for texts in (inside, outside)]
    length = min(MAX_LENGTH, model.facts.max_context)
    forget, retain = ([_rows(model, part, length, generator) for part in _set_aside(texts)] for texts in drawn)
    papers = [
        TextPaper(name, rows[:EXAM_ROWS], model.special, BATCH_ROWS)
        for name, rows in ((topic, forget[1]), (f"not {topic}", retain[1]))
    ]
    rows = (forget[0][:TEXT_ROWS], retain[0][:TEXT_ROWS])
    return Material(f"stdlib: {topic}", model_name, model, *rows, papers[:1], papers[1:], SWEEP)


def _set_aside(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts for choosing latents, and texts for the exam."""
    chosen = [text for number, text in enumerate(texts) if number % EXAM_SHARE]
    return chosen, list(texts[::EXAM_SHARE])


def _rows(model: LanguageModel, texts: Sequence[str], length: int, generator: torch.Generator) -> Tensor:
    rows = joined_rows(texts, model.tokenizer, eos_text(model), model.bos, model.pad, length)
    return shuffled_rows(rows, len(rows), generator)
