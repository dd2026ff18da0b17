"""SAEBench's material: biology from WMDP to forget, WikiText and four subjects of MMLU to retain.

The questions are put to an instruction-tuned model of the family the SAE was trained on, in that model's own
prompt format; only Gemma's is known. The forget corpus is given out on request, as a file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from ...context.context import Context, find_model
from ...context.hub_data import load_rows
from ...errors import DataMissing, NotApplicable
from ...model.prefix_suffix import LanguageModel, load_language_model
from .material import Material, eos_text, joined_rows, sampled_texts, shuffled_rows
from .papers import ChoicePaper, Question
from .sweep import Sweep

FORGET_EXAM = "wmdp-bio"
FORGET_SUBJECT = "biology"
MIN_CHARACTERS = 50
REQUEST_FORM = "https://huggingface.co/datasets/cais/wmdp-corpora"


def load_wmdp(
    context: Context, model_name: str, corpus: str, names: Sequence[str], size: int, length: int, batch: int, seed: int
) -> Material:
    """All of it; what needs no download is looked at first, so that a missing file is said at once."""
    forget_texts = read_corpus(Path(corpus).expanduser())
    retain_texts = [row["text"] for row in load_rows("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    questions = {name: read_questions(name) for name in names}
    model = load_instructed(context, model_name)
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    long_enough = [text for text in retain_texts if len(text) > MIN_CHARACTERS]
    rows = [
        joined_rows(texts, model.tokenizer, eos_text(model), model.bos, model.pad, length)
        for texts in (sampled_texts(forget_texts, size, draw), long_enough)
    ]
    forget_rows, retain_rows = (shuffled_rows(each, size, generator) for each in rows)
    papers = [ChoicePaper(name, asked, model, batch) for name, asked in questions.items()]
    forget = [paper for paper in papers if paper.name == FORGET_EXAM]
    retain = [paper for paper in papers if paper.name != FORGET_EXAM]
    return Material("wmdp-bio", model_name, model, forget_rows, retain_rows, forget, retain, Sweep())


def read_corpus(file: Path) -> list[str]:
    """The texts of the forget corpus: a JSON object with `text` on each line."""
    if not file.is_file():
        raise DataMissing(
            f"the forget corpus is not at {file}. Ask for bio-forget-corpus.jsonl by the form that {REQUEST_FORM} "
            "names, and give its place with --set unlearning.forget_corpus=FILE"
        )
    try:
        texts = [str(json.loads(line)["text"]) for line in file.read_text(encoding="utf-8").splitlines() if line]
    except (ValueError, KeyError, TypeError) as error:
        raise DataMissing(f"{file}: expected a JSON object with 'text' on each line, found {error!r}") from error
    return [text for text in texts if len(text) > MIN_CHARACTERS]


def read_questions(name: str) -> list[Question]:
    """The test questions of WMDP, or of a subject of MMLU."""
    is_forget = name == FORGET_EXAM
    rows = load_rows("cais/wmdp" if is_forget else "cais/mmlu", name, "test")
    subject = FORGET_SUBJECT if is_forget else name.replace("_", " ")
    return [Question(subject, row["question"], tuple(row["choices"]), int(row["answer"])) for row in rows]


def load_instructed(context: Context, name: str) -> LanguageModel:
    """The instruction-tuned model: the SAE reads it although it was trained on the base model."""
    if "gemma" not in name.lower() or "it" not in name.lower().split("/")[-1].split("-"):
        raise NotApplicable(
            f"{name} is not an instruction-tuned Gemma: SAEBench has no other prompt format. Give "
            "--set unlearning.model=google/gemma-2-2b-it, or --set unlearning.data=stdlib for any model"
        )
    source = find_model(None, name)
    context.say(f"loading {source.id} for its answers")
    return load_language_model(source.folder, context.dtype, context.device)
