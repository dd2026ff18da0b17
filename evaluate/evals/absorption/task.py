"""The task on a model: words, prompts, and the probes that say which classes (first letters) the model knows.

1. Words of the vocabulary are split, and each gets a prompt with examples of its own half.
2. A probe for each layer is fitted on the residuals at the training words.
3. Test words that the probe gets right are asked once more, with examples from all words: there absorption
   is measured.
Every draw comes from the seed. The official package declares a seed and never applies it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...context.prompt_positions import Reader, Reading
from .probe import Probe, Training, f1_score, fit_probe
from .vocabulary import Prompt, WordClasses, make_prompt, make_spots, split_words

TRAIN_SHARE = 0.8


@dataclass(frozen=True, eq=False)
class Half:
    """Words of one half, as they are read."""

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
    again: Reading
    """The test words once more, in new prompts; those that no probe found are not among them."""
    place_again: Tensor
    """int64 [test words]: their place in `again`, -1 for those that are not there."""

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
    prompts = [_prompts(half, half, classes, draw) for half in halves]
    advance = stage("words", sum(map(len, prompts)))
    train, test = (
        Half(half, _labels(half, classes, reader), reader.read(make_spots(asked, classes, reader.model), advance))
        for half, asked in zip(halves, prompts, strict=True)
    )
    probes = {layer: _fit(layer, train, test, len(classes.names), seed) for layer in train.reading.x}
    is_found = torch.stack([probe.found for probe in probes.values()]).any(0)
    found: list[int] = is_found.nonzero().view(-1).tolist()
    fresh = _prompts([test.words[number] for number in found], words, classes, draw)
    again = reader.read(make_spots(fresh, classes, reader.model), stage("known words", len(fresh)))
    return Task(classes, train, test, probes, again, torch.where(is_found, is_found.cumsum(0) - 1, -1))


def _prompts(words: Sequence[str], examples: Sequence[str], classes: WordClasses, draw: random.Random) -> list[Prompt]:
    return [make_prompt(word, examples, classes, draw) for word in words]


def _labels(words: Sequence[str], classes: WordClasses, reader: Reader) -> Tensor:
    return torch.tensor([classes.class_of(word) for word in words], device=reader.model.device)


def _fit(layer: int, train: Half, test: Half, num_classes: int, seed: int) -> ClassProbe:
    generator = torch.Generator().manual_seed(seed)
    probe = fit_probe(train.reading.x[layer], train.labels, num_classes, Training(), generator)
    says_NC = probe.scores(test.reading.x[layer]) > 0
    claimed = says_NC.cpu().numpy()
    f1 = tuple(f1_score(test.is_of(number), claimed[:, number]) for number in range(num_classes))
    return ClassProbe(probe, f1, says_NC.gather(1, test.labels[:, None]).view(-1))
