"""The task on a model: words, prompts, and the probes that say which classes (first letters) the model knows.

1. Words of the vocabulary are split into training and test, and each gets a prompt with examples of its own half.
2. A probe for each layer is fitted on the residuals at the training words.
3. Test words that a layer's probe gets right are asked again, with examples from all words: absorption is measured
   there. A layer's draws do not depend on which other layers are read.
Every draw comes from the seed. The official package declares a seed and never applies it.

Words are tokens of the model's vocabulary that consist of ASCII letters, possibly after a space.

Classes are first letters, or shapes, which even the pocket model knows: small models do not learn how their tokens are
spelled, but to predict what follows they must know whether a token begins a word, and whether it is a name, a constant
or plain text.

Probes are one-vs-rest and linear, all letters at once: binary cross-entropy with positives weighted by negatives /
positives, Adam, and a learning rate that falls exponentially from epoch to epoch. With `l1_decay` the weights become
sparse, for choosing latents. The latents of a letter:
1. A probe with an L1 penalty is fitted on the latents, all letters at once.
2. For each letter, latents are ranked by weight, the largest first; negative weights rank last.
3. A logistic regression on the first k shows how well k latents predict the letter, by F1 on the test words.
4. k grows while F1 gains more than a threshold: those latents are the letter's, and more than one means that the
   feature was split.

N rows, D width, L letters, F latents, K of them.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ....harvest.progress import Watch
from ...context.prompt_positions import Reader, Reading, Spot
from ...errors import NotApplicable, SettingInvalid
from ...model.logistic_regression import fitted, has_converged
from ...model.prefix_suffix import LanguageModel

LETTERS = string.ascii_lowercase
SHAPES = ("inside", "Inside", "INSIDE", "word", "Word", "WORD")
"""Lower case, capitalised and upper case; first inside a word or name, then at its start."""
NUM_EXAMPLES = 10
MAX_DRAWS = 1000
SEPARATOR = "\n"


@dataclass(frozen=True)
class Training:
    """How a probe is fitted; the defaults are those of the ground-truth probe."""

    epochs: int = 50
    batch_size: int = 64
    lr: float = 1e-2
    end_lr: float = 1e-5
    weight_decay: float = 1e-4
    l1_decay: float = 0.0


@dataclass(frozen=True, eq=False)
class Probe:
    weights: Tensor  # [L, D]
    biases: Tensor  # [L]

    def scores(self, x_ND: Tensor) -> Tensor:
        """[N, L]; above zero means yes."""
        return functional.linear(x_ND, self.weights, self.biases)


def fit_probe(
    x_ND: Tensor,
    labels_N: Tensor,
    num_letters: int,
    training: Training,
    generator: torch.Generator,
    encode: Callable[[Tensor], Tensor] | None = None,
    width: int | None = None,
) -> Probe:
    """Fit a probe on rows, or on each batch of rows as `encode` maps it (to width `width`)."""
    targets_NL = functional.one_hot(labels_N, num_letters).to(x_ND.dtype)
    parameters = _initial(width or x_ND.shape[1], num_letters, generator, x_ND)
    optimizer = torch.optim.Adam(parameters, lr=training.lr, weight_decay=training.weight_decay)
    positives = targets_NL.sum(0)  # without any, SAEBench's weight is infinite and makes the loss NaN
    weights = torch.where(positives > 0, (len(targets_NL) - positives) / positives, 1.0)
    for epoch in range(training.epochs):
        optimizer.param_groups[0]["lr"] = training.lr * (training.end_lr / training.lr) ** (epoch / training.epochs)
        order = torch.randperm(len(x_ND), generator=generator).to(x_ND.device)
        for rows in order.split(training.batch_size):
            x = x_ND[rows] if encode is None else encode(x_ND[rows])
            scores = functional.linear(x, *parameters)
            loss = functional.binary_cross_entropy_with_logits(scores, targets_NL[rows], pos_weight=weights)
            loss = loss + training.l1_decay * parameters[0].abs().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Probe(*(parameter.detach() for parameter in parameters))


def _initial(width: int, num_letters: int, generator: torch.Generator, like: Tensor) -> list[Tensor]:
    """Uniform in +-1 / sqrt(width), like `nn.Linear`."""
    bound = 1 / math.sqrt(width)
    shapes = ((num_letters, width), (num_letters,))
    drawn = (torch.rand(shape, generator=generator) * 2 * bound - bound for shape in shapes)
    return [values.to(like).requires_grad_() for values in drawn]


Chosen = tuple[tuple[int, ...], tuple[bool, ...]]
"""A letter's latents, and whether each of the regressions that chose them converged."""


def choose_latents(
    ranked_K: Sequence[int],
    train_NK: np.ndarray,
    is_train: np.ndarray,
    test_NK: np.ndarray,
    is_test: np.ndarray,
    jump: float,
) -> Chosen:
    """The letter's latents; columns of the activations follow `ranked_K`. Stops at the first k that gains too
    little."""
    best, converged = -100.0, list[bool]()
    for k in range(1, len(ranked_K) + 1):
        f1, is_done = _f1_of_first(k, train_NK, is_train, test_NK, is_test)
        converged.append(is_done)
        if f1 <= best + jump:
            return tuple(ranked_K[: k - 1]), tuple(converged)
        best = f1
    return tuple(ranked_K), tuple(converged)


def f1_score(truth: np.ndarray, claimed: np.ndarray) -> float:
    """Harmonic mean of precision and recall; 0 where nothing was found."""
    hits = int((truth & claimed).sum())
    return 2 * hits / (int(truth.sum()) + int(claimed.sum())) if hits else 0.0


def _f1_of_first(
    k: int, train_NK: np.ndarray, is_train: np.ndarray, test_NK: np.ndarray, is_test: np.ndarray
) -> tuple[float, bool]:
    regression = fitted(train_NK[:, :k], is_train.astype(np.int64), max_iter=500, class_weight="balanced")
    return f1_score(is_test, regression.decision_function(test_NK[:, :k]) > 0.0), has_converged(regression)


@dataclass(frozen=True)
class WordClasses:
    """Classes of words, and how prompts ask for a word's class and answer in their examples."""

    names: tuple[str, ...]
    class_of: Callable[[str], int]
    answer: Callable[[str], str]
    template: str
    """A word's line, to which the answer is added after a space."""


def alphabetic_words(tokens: Iterable[str], to_text: Callable[[str], str]) -> list[str]:
    """The text of every alphabetic token, in the order given; `to_text` is the tokenizer's decoder of one token."""
    words = []
    for token in tokens:
        text = to_text(token)
        if token.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" "):  # SentencePiece's space
            text = f" {text}"  # some decoders drop a first token's
        if (letters := text.removeprefix(" ")).isascii() and letters.isalpha():
            words.append(text)
    return words


def first_letter(word: str) -> str:
    return word.strip()[0].upper()


FIRST_LETTER = WordClasses(
    tuple(LETTERS), lambda word: LETTERS.index(first_letter(word).lower()), first_letter, "{word} has the first letter:"
)


def shape_index(word: str) -> int:
    letters = word.removeprefix(" ")
    case = 0 if letters.islower() else 2 if letters.isupper() and len(letters) > 1 else 1
    return case + 3 * word.startswith(" ")


WORD_SHAPES = WordClasses(SHAPES, shape_index, lambda word: SHAPES[shape_index(word)], "{word} is:")


def make_prompt(word: str, examples: Sequence[str], classes: WordClasses, draw: random.Random) -> str:
    """A prompt about `word`, with examples of other words."""
    lines = [f"{_line(classes, example)} {classes.answer(example)}" for example in _draw(word, examples, draw)]
    return SEPARATOR + SEPARATOR.join([*lines, _line(classes, word)])


def longest_prompt(words: Sequence[str], classes: WordClasses, model: LanguageModel) -> int:
    """The most tokens that a prompt can have: BOS, and the longest lines."""
    lines = model.tokenizer.encode([f"{SEPARATOR}{_line(classes, word)} {classes.answer(word)}" for word in words])
    return 1 + sum(sorted(map(len, lines))[-NUM_EXAMPLES - 1 :])


def make_spots(prompts: Sequence[str], classes: WordClasses, model: LanguageModel) -> list[Spot]:
    """Where prompts are read: at the word's last token, before the rest of its line."""
    position = word_position(model, classes.template)
    return [Spot(tokens, position) for tokens in model.token_rows(prompts)]


def word_position(model: LanguageModel, template: str) -> int:
    """Where the word ends in a prompt, counted from its end; -6 for SAEBench's template and Gemma's tokens."""
    tail = template.split("{word}")[1]
    # The tail is not encoded alone, because some tokenizers put a space before every text.
    word, line = model.tokenizer.encode(["A", f"A{tail}"])
    return len(word) - len(line) - 1


def split_words(words: Sequence[str], draw: random.Random) -> tuple[list[str], list[str]]:
    """Four fifths of the words for training and the rest for testing, in random order."""
    shuffled = draw.sample(list(words), len(words))
    cut = int(len(shuffled) * 0.8)
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
    """A layer's probe, its F1 for each class, and the test words that it gets right."""

    probe: Probe
    f1: tuple[float, ...]
    found: Tensor  # bool [test words]

    def known(self, min_f1: float) -> list[int]:
        return [number for number, f1 in enumerate(self.f1) if f1 > min_f1]


@dataclass(frozen=True, eq=False)
class Task:
    """Everything that a model's SAEs share."""

    classes: WordClasses
    train: Half
    test: Half
    probes: dict[int, ClassProbe]  # by layer
    again: dict[int, Reading]
    """By layer, the test words that its probe found, read in new prompts; without layers that found none."""


def make_task(reader: Reader, words: Sequence[str], classes: WordClasses, seed: int, watch: Watch) -> Task:
    """Read all words and fit the probes."""
    draw = random.Random(seed)
    halves = split_words(words, draw)
    require_examples(halves, len(words))
    prompts = [_prompts(half, half, classes, draw) for half in halves]
    with watch.stage("absorption: words", sum(map(len, prompts)), "words") as advance:
        train, test = (
            Half(
                half,
                torch.tensor([classes.class_of(word) for word in half], device=reader.model.device),
                reader.read(make_spots(asked, classes, reader.model), advance),
            )
            for half, asked in zip(halves, prompts, strict=True)
        )
    probes = {layer: _fit(layer, train, test, len(classes.names), seed) for layer in train.reading.x}
    fresh, drawn = {}, draw.getstate()
    for layer, probe in probes.items():
        draw.setstate(drawn)
        found: list[int] = probe.found.nonzero().view(-1).tolist()
        asked_again = _prompts([test.words[number] for number in found], words, classes, draw)
        fresh[layer] = make_spots(asked_again, classes, reader.model)
    readers = {layer: replace(reader, subjects=[s for s in reader.subjects if s.layer == layer]) for layer in probes}
    with watch.stage("absorption: known words", sum(map(len, fresh.values())), "words") as advance:
        again = {layer: readers[layer].read(spots, advance) for layer, spots in fresh.items() if spots}
    return Task(classes, train, test, probes, again)


def require_examples(halves: Sequence[Sequence[str]], words: int) -> None:
    """Require enough words in each half, because a prompt shows other words of its own half."""
    least = min(map(len, halves))
    if least <= NUM_EXAMPLES:
        raise NotApplicable(
            f"the smaller half of {words} words has {least}, but a prompt shows {NUM_EXAMPLES} others: ask for more "
            "words (absorption.max_words), or use a model with more words in its vocabulary"
        )


def require_template(template: str) -> None:
    """Require exactly one place for the word, and nothing else to fill in."""
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
    has_both = [0 < train.is_of(number).sum() < len(train.words) for number in range(num_classes)]  # yes and no
    f1 = tuple(f1_score(test.is_of(n), claimed[:, n]) if has_both[n] else 0.0 for n in range(num_classes))
    return ClassProbe(probe, f1, says_NC.gather(1, test.labels[:, None]).view(-1))
