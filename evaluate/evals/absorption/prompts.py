"""Prompts that make a model think of a word's class, such as its first letter: ten solved examples, then the word."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ...context.prompt_positions import Spot
from ...model.lm import LanguageModel
from .vocabulary import WordClasses

NUM_EXAMPLES = 10
MAX_DRAWS = 1000
SEPARATOR = "\n"


@dataclass(frozen=True)
class Prompt:
    word: str
    text: str


def make_prompt(word: str, examples: Sequence[str], classes: WordClasses, draw: random.Random) -> Prompt:
    """A prompt about `word`; its examples are drawn anew until the word is not among them."""
    lines = [f"{_line(classes, example)} {classes.answer(example)}" for example in _draw(word, examples, draw)]
    return Prompt(word, SEPARATOR + SEPARATOR.join([*lines, _line(classes, word)]))


def make_spots(prompts: Sequence[Prompt], classes: WordClasses, model: LanguageModel) -> list[Spot]:
    """Where prompts are read: at the word's last token, so many before the end as the line has behind the word."""
    position = word_position(model, classes.template)
    ids = model.tokenizer.encode([prompt.text for prompt in prompts])
    return [Spot((model.bos, *tokens), position) for tokens in ids]


def word_position(model: LanguageModel, template: str) -> int:
    """Where the word ends in a prompt, counted from its end; -6 for SAEBench's template and Gemma's tokens."""
    return -len(model.tokenizer.encode([template.split("{word}")[1]])[0]) - 1


def split_words(words: Sequence[str], train_share: float, draw: random.Random) -> tuple[list[str], list[str]]:
    """Words for training and for testing, in random order."""
    shuffled = draw.sample(list(words), len(words))
    cut = int(len(shuffled) * train_share)
    return shuffled[:cut], shuffled[cut:]


def _line(classes: WordClasses, word: str) -> str:
    return classes.template.format(word=word)


def _draw(word: str, examples: Sequence[str], draw: random.Random) -> list[str]:
    for _ in range(MAX_DRAWS):
        drawn = draw.sample(examples, NUM_EXAMPLES)
        if word not in drawn:
            return drawn
    raise ValueError(f"no {NUM_EXAMPLES} examples without {word!r} among {len(examples)} words after {MAX_DRAWS} draws")
