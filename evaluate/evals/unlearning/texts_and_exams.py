"""An unlearning evaluation's material: a text to forget, a text to retain, and exams on both.

`stdlib`, a topic to forget without a download: one package of the standard library, against all others.

1. Documents of the topic and documents of the rest are read from this Python's installation.
2. Every third document is set aside for the exam; latents are chosen on the others.
3. The exam asks for next tokens (`TextPaper`), because a small base model answers no questions.

`wmdp`, SAEBench's: biology from WMDP to forget, WikiText and four subjects of MMLU to retain.

The questions are put to an instruction-tuned model of the family that the SAE was trained on, in that model's prompt
format; only Gemma's is known. The forget corpus is a file that is available on request.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ....harvest.corpus.stdlib import stdlib_documents
from ....harvest.model.tokenizer import TextEncoder
from ...context.context import Context, find_model
from ...context.evaluation_data_sets import load_rows
from ...errors import DataMissing, NotApplicable, SettingInvalid
from ...model.prefix_suffix import LanguageModel, load_language_model
from .exams import ChoicePaper, Paper, Question, TextPaper
from .interventions import Sweep

CHUNKS = 20
"""The joined text is cut into this many strings before it is tokenised, wherever the cut falls."""


def joined_rows(texts: Sequence[str], encoder: TextEncoder, eos_text: str, bos: int, pad: int, length: int) -> Tensor:
    """int64 [rows, length]. Every chunk starts with BOS, and so does every row, in the place of its first token."""
    whole = eos_text.join(texts)
    size = (len(whole) - 1) // CHUNKS + 1
    chunks = [whole[start : start + size] for start in range(0, CHUNKS * size, size or 1)]
    ids = [token for chunk in encoder.encode(chunks) for token in (bos, *chunk) if token != pad]
    if len(ids) < length:
        raise DataMissing(
            f"expected text for at least one row of {length} tokens, found {len(ids)}: give more text (--set "
            "unlearning.forget_corpus=FILE, or unlearning.topic=NAME of the standard library), or for WMDP ask for "
            "shorter rows (unlearning.seq_len=N)"
        )
    rows = torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)
    rows[:, 0] = bos
    return rows


def sampled_texts(texts: Sequence[str], number: int, draw: random.Random) -> list[str]:
    """At most `number` of the texts, in random order."""
    return draw.sample(list(texts), min(number, len(texts)))


def eos_text(model: LanguageModel) -> str:
    """How EOS is written in text."""
    if model.eos is None:
        raise DataMissing(
            "the model's tokenizer has no EOS token, which this evaluation puts between documents: use a model "
            "whose tokenizer has one"
        )
    return model.tokenizer.backend.id_to_token(model.eos)


@dataclass(frozen=True, eq=False)
class Material:
    """Texts as rows of tokens, papers, and the model that is asked, which may differ from the store's."""

    name: str
    model_name: str
    model: LanguageModel
    forget_rows: Tensor  # int64 [rows, T]
    retain_rows: Tensor
    forget: Sequence[Paper]
    retain: Sequence[Paper]
    sweep: Sweep
    """Tried unless the settings say otherwise."""
    only_reported: Sequence[Paper] = ()
    """Neither to be forgotten nor to be retained."""

    @property
    def papers(self) -> tuple[Paper, ...]:
        return (*self.forget, *self.retain, *self.only_reported)


TEXT_ROWS, EXAM_ROWS = 48, 24
MAX_LENGTH = 128
TEXTS = 120
"""The most documents of each kind that are read."""
EXAM_SHARE = 3
SWEEP = Sweep(retain_thresholds=(0.01, 0.05), num_latents=(5, 20), multipliers=(1, 2, 5, 10))
"""Gentler than SAEBench's, whose multipliers suit the residuals of Gemma-2-2b, and laxer about text outside the topic,
because the whole library is code."""
BATCH_ROWS = 8


def load_topic(model: LanguageModel, model_name: str, topic: str, seed: int) -> Material:
    """Forget the documents under `topic` (a folder of the library), retain the rest."""
    names_and_texts = list(stdlib_documents())
    inside = [text for name, text in names_and_texts if name.startswith(f"{topic}/")]
    outside = [text for name, text in names_and_texts if not name.startswith(f"{topic}/")]
    if len(inside) < 2 * EXAM_SHARE:
        raise DataMissing(
            f"expected a package of the standard library with at least {2 * EXAM_SHARE} files, found {len(inside)} "
            f"under {topic!r}: choose another with --set unlearning.topic=NAME, for example asyncio, email or xml"
        )
    return make_material(model, model_name, inside, outside, topic, seed)


def make_material(
    model: LanguageModel, model_name: str, inside: Sequence[str], outside: Sequence[str], topic: str, seed: int
) -> Material:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    drawn = [sampled_texts(texts, TEXTS, draw) for texts in (inside, outside)]
    length = min(MAX_LENGTH, model.facts.max_context)
    forget, retain = (
        [
            _rows(model, part, length, generator)
            for part in ([text for at, text in enumerate(texts) if at % EXAM_SHARE], texts[::EXAM_SHARE])
        ]
        for texts in drawn
    )
    papers = [
        TextPaper(name, rows[:EXAM_ROWS], model.special, BATCH_ROWS)
        for name, rows in ((topic, forget[1]), (f"not {topic}", retain[1]))
    ]
    rows = (forget[0][:TEXT_ROWS], retain[0][:TEXT_ROWS])
    return Material(f"stdlib: {topic}", model_name, model, *rows, papers[:1], papers[1:], SWEEP)


def _rows(model: LanguageModel, texts: Sequence[str], length: int, generator: torch.Generator) -> Tensor:
    """In random order."""
    rows = joined_rows(texts, model.tokenizer, eos_text(model), model.bos, model.pad, length)
    return rows[torch.randperm(len(rows), generator=generator)]


WIKITEXT = "Salesforce/wikitext"
FORGET_EXAM = "wmdp-bio"
ONLY_REPORTED = "college_biology"
"""Close to the topic: as in SAEBench, it does not have to be retained."""
MIN_CHARACTERS = 50


def load_wmdp(
    context: Context, model_name: str, corpus: str, names: Sequence[str], size: int, length: int, batch: int, seed: int
) -> Material:
    """All of WMDP's material; the local file is read first, so that its absence is reported before any download."""
    if FORGET_EXAM not in names or not set(names) - {FORGET_EXAM, ONLY_REPORTED}:
        raise SettingInvalid(
            f"unlearning.dataset_names: expected {FORGET_EXAM} to forget and subjects of MMLU to retain "
            f"({ONLY_REPORTED} is not one of them), found {', '.join(names) or 'none'}"
        )
    forget_texts = read_corpus(corpus_file(corpus))
    retain_texts = [row["text"] for row in load_rows(WIKITEXT, "wikitext-2-raw-v1")]
    questions = {name: read_questions(name) for name in names}
    model = load_instructed(context, model_name)
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    long_enough = [text for text in retain_texts if len(text) > MIN_CHARACTERS]
    both = sampled_texts(forget_texts, size, draw), long_enough
    forget_rows, retain_rows = (_rows(model, texts, length, generator)[:size] for texts in both)
    papers = [ChoicePaper(name, asked, model, batch) for name, asked in questions.items()]
    forget = [paper for paper in papers if paper.name == FORGET_EXAM]
    reported = [paper for paper in papers if paper.name == ONLY_REPORTED]
    retain = [paper for paper in papers if paper.name not in (FORGET_EXAM, ONLY_REPORTED)]
    return Material("wmdp-bio", model_name, model, forget_rows, retain_rows, forget, retain, Sweep(), reported)


def corpus_file(name: str) -> Path:
    return Path(os.path.expanduser(name))


def read_corpus(file: Path) -> list[str]:
    """The texts of the forget corpus: a JSON object with `text` on each line."""
    if not file.is_file():
        raise DataMissing(
            f"there is no forget corpus at {file}: request bio-forget-corpus.jsonl with the form on "
            "https://huggingface.co/datasets/cais/wmdp-corpora, and give its path with --set "
            "unlearning.forget_corpus=FILE"
        )
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines also cuts where a text has U+2028
        texts = [str(json.loads(line)["text"]) for line in lines if line]
    except (ValueError, KeyError, TypeError) as error:
        raise DataMissing(f"{file}: expected a JSON object with 'text' on each line, found {error!r}") from error
    long_enough = [text for text in texts if len(text) > MIN_CHARACTERS]
    if not long_enough:
        raise DataMissing(
            f"{file}: expected texts of more than {MIN_CHARACTERS} characters, found {len(texts)} texts, none that "
            "long: give the whole corpus with --set unlearning.forget_corpus=FILE"
        )
    return long_enough


def data_set_of(name: str) -> str:
    """The data set on the hub with the questions of an exam."""
    return "cais/wmdp" if name == FORGET_EXAM else "cais/mmlu"


def read_questions(name: str) -> list[Question]:
    """The test questions of WMDP, or of a subject of MMLU."""
    rows = load_rows(data_set_of(name), name)
    subject = "biology" if name == FORGET_EXAM else name.replace("_", " ")
    return [Question(subject, row["question"], tuple(row["choices"]), int(row["answer"])) for row in rows]


def load_instructed(context: Context, name: str) -> LanguageModel:
    """The instruction-tuned model, which SAEs read although they were trained on the base model."""
    if "gemma" not in name.lower() or "it" not in name.lower().split("/")[-1].split("-"):
        raise NotApplicable(
            f"{name} is not an instruction-tuned Gemma, and SAEBench has no other prompt format: use "
            "--set unlearning.model=google/gemma-2-2b-it, or --set unlearning.data=stdlib for any model"
        )
    source = find_model(None, name)
    context.say(f"loading {source.id} for its answers")
    return load_language_model(source.folder, context.dtype, context.device)
