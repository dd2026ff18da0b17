"""The task on a model: words, prompts, and the probes that say which classes (first letters) the model knows.

1. Words of the vocabulary are split, and each gets a prompt with examples of its own half.
2. A probe for each layer is fitted on the residuals at the training words.
3. Test words that a layer's probe gets right are asked once more, with examples from all words: absorption is
   measured there. A layer's draws do not depend on which other layers are read.
Every draw comes from the seed. The official package declares a seed and never applies it.

Words are tokens of the model's vocabulary made of ASCII letters, perhaps after a space.

Classes are first letters, or shapes, which even the pocket model knows: small models do not learn how their
tokens are spelled, but to predict what follows they must know whether a token begins a word, and whether it is a
name, a constant or plain text.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...context.prompt_positions import Reader, Reading, Spot
from ...errors import NotApplicable, SettingInvalid
from ...model.prefix_suffix import LanguageModel
from .probe import Probe, Training, f1_score, fit_probe

LETTERS = string.ascii_lowercase
SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a leading space
SHAPES = ("inside", "Inside", "INSIDE", "word", "Word", "WORD")
"""Lower case, capitalised and upper case; inside a word or name, and at the start of one."""
NUM_EXAMPLES = 10
MAX_DRAWS = 1000
SEPARATOR = "\n"
TRAIN_SHARE = 0.8


@dataclass(frozen=True)
class WordClasses:
    """What is asked about a word: its class, as the examples in a prompt answer it."""

    names: tuple[str, ...]
    class_of: Callable[[str], int]
    answer: Callable[[str], str]
    template: str
    """A word's line, to which the answer is added after a space."""


def alphabetic_words(tokens: Iterable[str], to_text: Callable[[str], str]) -> list[str]:
    """The text of every alphabetic token, in the order given; `to_text` is the tokenizer's decoder of one token."""
    words = (word_of(token, to_text) for token in tokens)
    return [word for word in words if (letters := word.removeprefix(" ")).isascii() and letters.isalpha()]


def word_of(token: str, to_text: Callable[[str], str]) -> str:
    """A token as it reads, with its leading space: some decoders drop that of a first token."""
    text = to_text(token)
    return f" {text}" if token.startswith(SPACE_MARK) and not text.startswith(" ") else text


def letter_index(word: str) -> int:
    """0 for a, 25 for z."""
    return LETTERS.index(first_letter(word).lower())


def first_letter(word: str) -> str:
    return word.strip()[0].upper()


FIRST_LETTER = WordClasses(tuple(LETTERS), letter_index, first_letter, "{word} has the first letter:")


def shape_index(word: str) -> int:
    letters = word.removeprefix(" ")
    case = 0 if letters.islower() else 2 if letters.isupper() and len(letters) > 1 else 1
    return case + 3 * word.startswith(" ")


def shape_of(word: str) -> str:
    return SHAPES[shape_index(word)]


WORD_SHAPES = WordClasses(SHAPES, shape_index, shape_of, "{word} is:")


def make_prompt(word: str, examples: Sequence[str], classes: WordClasses, draw: random.Random) -> str:
    """A prompt about `word`; its examples are drawn again until the word is not among them."""
    lines = [f"{_line(classes, example)} {classes.answer(example)}" for example in _draw(word, examples, draw)]
    return SEPARATOR + SEPARATOR.join([*lines, _line(classes, word)])


def longest_prompt(words: Sequence[str], classes: WordClasses, model: LanguageModel) -> int:
    """How many tokens a prompt has at most, whatever is drawn: BOS, and the longest lines."""
    lines = model.tokenizer.encode([f"{SEPARATOR}{_line(classes, word)} {classes.answer(word)}" for word in words])
    return 1 + sum(sorted(map(len, lines))[-NUM_EXAMPLES - 1 :])


def make_spots(prompts: Sequence[str], classes: WordClasses, model: LanguageModel) -> list[Spot]:
    """Where prompts are read: at the word's last token, with the rest of its line behind it."""
    position = word_position(model, classes.template)
    return [Spot((model.bos, *tokens), position) for tokens in model.tokenizer.encode(prompts)]


def word_position(model: LanguageModel, template: str) -> int:
    """Where the word ends in a prompt, counted from its end; -6 for SAEBench's template and Gemma's tokens."""
    tail = template.split("{word}")[1]
    word, line = model.tokenizer.encode(["A", f"A{tail}"])  # some tokenizers begin every text with a space
    return len(word) - len(line) - 1


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
    raise NotApplicable(
        f"no {NUM_EXAMPLES} examples without {word!r} among {len(examples)} words after {MAX_DRAWS} draws: ask for "
        "more words (absorption.max_words)"
    )


@dataclass(frozen=True, eq=False)
class Half:
    words: Sequence[str]
    labels: Tensor  # int64 [N], on the model's device
    reading: Reading

    def is_of(self, number: int) -> np.ndarray:
        """bool [N]."""
        return (self.labels == number).cpu().numpy()


@dataclass(frozen=True, eq=False)
class ClassProbe:
    """The probe of a layer, how good it is for each class, and the test words that it gets right."""

    probe: Probe
    f1: tuple[float, ...]
    found: Tensor  # bool [test words]

    def known(self, min_f1: float) -> list[int]:
        return [number for number, f1 in enumerate(self.f1) if f1 > min_f1]


@dataclass(frozen=True, eq=False)
class Task:
    """All that is common to the SAEs of a model."""

    classes: WordClasses
    train: Half
    test: Half
    probes: dict[int, ClassProbe]  # by layer
    again: dict[int, Reading]
    """By layer, the test words that its probe found, read in new prompts; none if it found none."""

    def found_words(self, layer: int, number: int) -> Tensor:
        """Which test words of a class the layer's probe found."""
        return (self.probes[layer].found & (self.test.labels == number)).nonzero().view(-1)


def make_task(
    reader: Reader,
    words: Sequence[str],
    classes: WordClasses,
    seed: int,
    stage: Callable[[str, int], Callable[[int], None]],
) -> Task:
    """Read all words and fit the probes."""
    draw = random.Random(seed)
    halves = split_words(words, TRAIN_SHARE, draw)
    require_examples(halves, len(words))
    prompts = [_prompts(half, half, classes, draw) for half in halves]
    advance = stage("words", sum(map(len, prompts)))
    train, test = (
        Half(
            half,
            torch.tensor([classes.class_of(word) for word in half], device=reader.model.device),
            reader.read(make_spots(asked, classes, reader.model), advance),
        )
        for half, asked in zip(halves, prompts, strict=True)
    )
    probes = {layer: _fit(layer, train, test, len(classes.names), seed) for layer in train.reading.x}
    fresh, behind = {}, draw.getstate()
    for layer, probe in probes.items():
        draw.setstate(behind)
        found: list[int] = probe.found.nonzero().view(-1).tolist()
        asked_again = _prompts([test.words[number] for number in found], words, classes, draw)
        fresh[layer] = make_spots(asked_again, classes, reader.model)
    advance = stage("known words", sum(map(len, fresh.values())))
    readers = {layer: replace(reader, subjects=[s for s in reader.subjects if s.layer == layer]) for layer in probes}
    again = {layer: readers[layer].read(spots, advance) for layer, spots in fresh.items() if spots}
    return Task(classes, train, test, probes, again)


def require_examples(halves: Sequence[Sequence[str]], words: int) -> None:
    """Require enough words in each half, since a prompt shows other words of its own half."""
    least = min(map(len, halves))
    if least <= NUM_EXAMPLES:
        raise NotApplicable(
            f"one half of {words} words has {least}, but a prompt shows {NUM_EXAMPLES} others: ask for more words "
            "(absorption.max_words), or give a model with more of them in its vocabulary"
        )


def require_template(template: str) -> None:
    """Require one place for the word in its line, and nothing else to fill in."""
    try:
        is_plain = template.count("{word}") == 1 and template.format(word="A") == template.replace("{word}", "A")
    except (LookupError, ValueError, AttributeError):
        is_plain = False
    if not is_plain:
        raise SettingInvalid(
            "absorption.prompt_template: expected {word} once and no other braces, as in "
            f"{FIRST_LETTER.template!r}, found {template!r}"
        )


def _prompts(words: Sequence[str], examples: Sequence[str], classes: WordClasses, draw: random.Random) -> list[str]:
    return [make_prompt(word, examples, classes, draw) for word in words]


def _fit(layer: int, train: Half, test: Half, num_classes: int, seed: int) -> ClassProbe:
    generator = torch.Generator().manual_seed(seed)
    probe = fit_probe(train.reading.x[layer], train.labels, num_classes, Training(), generator)
    says_NC = probe.scores(test.reading.x[layer]) > 0
    claimed = says_NC.cpu().numpy()
    taught = [0 < train.is_of(number).sum() < len(train.words) for number in range(num_classes)]  # two kinds of words
    f1 = tuple(f1_score(test.is_of(n), claimed[:, n]) if taught[n] else 0.0 for n in range(num_classes))
    return ClassProbe(probe, f1, says_NC.gather(1, test.labels[:, None]).view(-1))
