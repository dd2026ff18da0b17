"""Absorption of one SAE: its latents for each letter, and what other latents take of them. N words, F latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from ...context.loaded_sae import LoadedSae
from .measure import absorption
from .probe import Training, fit_probe
from .sparse import LetterLatents, choose_latents, ranked_latents
from .task import Task


@dataclass(frozen=True)
class LetterResult:
    """A letter's latents, and how many of its words were absorbed, and how far."""

    letter: str
    latents: tuple[int, ...]
    words: int
    fraction_sum: float
    full: int

    def to_json(self) -> dict[str, Any]:
        """Under SAEBench's keys."""
        return {
            "first_letter": self.letter,
            "mean_absorption_fraction": self.fraction_sum / self.words,
            "full_absorption_rate": self.full / self.words,
            "num_full_absorption": self.full,
            "num_probe_true_positives": self.words,
            "num_split_features": len(self.latents),
        }


@dataclass(frozen=True)
class Sparse:
    """Settings of the k-sparse probes."""

    training: Training
    max_k: int
    jump: float


def measure_letters(
    task: Task, subject: LoadedSae, letters: Sequence[int], sparse: Sparse, generator: torch.Generator
) -> list[LetterResult]:
    """One result a letter that has words which the probe found."""
    latents = letter_latents(task, subject, letters, sparse, generator)
    return [
        _measure(task, subject, letter, latents[letter].latents, found)
        for letter in letters
        if len(found := task.found_words(subject.layer, letter))
    ]


def letter_latents(
    task: Task, subject: LoadedSae, letters: Sequence[int], sparse: Sparse, generator: torch.Generator
) -> dict[int, LetterLatents]:
    """The latents that stand for each letter."""
    train = task.train
    rows = torch.arange(len(train.words), device=train.labels.device)
    probe = fit_probe(
        rows[:, None].to(torch.float32),
        train.labels,
        len(task.classes.names),
        sparse.training,
        generator,
        encode=lambda numbers: train.reading.acts_of(subject, numbers.view(-1).long()),
        width=subject.width,
    )
    ranked = ranked_latents(probe, min(sparse.max_k, subject.width))
    return {letter: _choose(task, subject, ranked[letter], letter, sparse.jump) for letter in letters}


def mean_metrics(results: Sequence[LetterResult]) -> dict[str, float]:
    """SAEBench's means over letters; deviations are those of a sample, 0 of a single letter."""
    found = [result.to_json() for result in results]
    columns = {
        "absorption_fraction_score": [row["mean_absorption_fraction"] for row in found],
        "full_absorption_score": [row["full_absorption_rate"] for row in found],
        "num_split_features": [row["num_split_features"] for row in found],
    }
    means = {f"mean_{name}": fmean(values) for name, values in columns.items()}
    deviations = {f"std_dev_{name}": stdev(values) if len(values) > 1 else 0.0 for name, values in columns.items()}
    return means | deviations


def _choose(task: Task, subject: LoadedSae, ranked: Tensor, letter: int, jump: float) -> LetterLatents:
    train_NK, test_NK = (half.reading.columns_of(subject, ranked).cpu().numpy() for half in (task.train, task.test))
    is_train, is_test = (half.is_of(letter) for half in (task.train, task.test))
    return choose_latents(ranked.tolist(), train_NK, is_train, test_NK, is_test, jump)


def _measure(task: Task, subject: LoadedSae, letter: int, own: tuple[int, ...], found: Tensor) -> LetterResult:
    places = task.place_again[found]
    direction = task.probes[subject.layer].probe.weights[letter]
    x_BD = task.again.x[subject.layer][places]
    with torch.no_grad():
        each = absorption(task.again.acts_of(subject, places), x_BD, subject.sae.W_dec, direction, own)
    return LetterResult(task.classes.names[letter], own, len(found), float(each.fraction.sum()), int(each.full.sum()))
