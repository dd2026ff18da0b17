"""The words of the task: tokens of the model's vocabulary made of ASCII letters, perhaps after a space.

Their classes are first letters, or shapes, which even the pocket model knows: small models do not learn how their
tokens are spelled, but whether a token begins a word, and whether it is a name, a constant or plain text, they must
know to go on.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ...context.prompt_positions import Spot
from ...model.prefix_suffix import LanguageModel

LETTERS = string.ascii_lowercase
SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a leading space


@dataclass(frozen=True)
class WordClasses:
    """What is asked of a word: one of these classes, which a prompt's examples answer."""

    names: tuple[str, ...]
    class_of: Callable[[str], int]
    answer: Callable[[str], str]
    template: str
    """A word's line, to which the answer is added after a space."""


def alphabetic_words(tokens: Iterable[str], to_text: Callable[[str], str]) -> list[str]:
    """The text of every alphabetic token, in the order given; `to_text` is the tokenizer's decoder of one token."""
    words = (word_of(token, to_text) for token in tokens)
    return [word for word in words if is_alphabetic(word)]


def word_of(token: str, to_text: Callable[[str], str]) -> str:
    """A token as it reads, with its leading space: some decoders drop that of a first token."""
    text = to_text(token)
    return f" {text}" if token.startswith(SPACE_MARK) and not text.startswith(" ") else text


def is_alphabetic(word: str) -> bool:
    letters = word.removeprefix(" ")
    return bool(letters) and letters.isascii() and letters.isalpha()


def letter_index(word: str) -> int:
    """0 for a, 25 for z."""
    return LETTERS.index(first_letter(word).lower())


def first_letter(word: str) -> str:
    return word.strip()[0].upper()


FIRST_LETTER = WordClasses(tuple(LETTERS), letter_index, first_letter, "{word} has the first letter:")


SHAPES = ("inside", "Inside", "INSIDE", "word", "Word", "WORD")
"""Lower case, capitalised and upper case; inside a word or name, and at the start of one."""


def shape_index(word: str) -> int:
    letters = word.removeprefix(" ")
    case = 0 if letters.islower() else 2 if letters.isupper() and len(letters) > 1 else 1
    return case + 3 * word.startswith(" ")


def shape_of(word: str) -> str:
    return SHAPES[shape_index(word)]


WORD_SHAPES = WordClasses(SHAPES, shape_index, shape_of, "{word} is:")


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
