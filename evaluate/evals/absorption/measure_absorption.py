"""Absorption in one SAE: its latents for each letter, and how much of a word's letter other latents carry.

A latent's part in the letter is its activation times the cosine between its decoder row and the letter's probe, for
rows scaled to length one. The whole is the residual's projection on the probe. N words, B words of a batch, F latents,
D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ....train.disk.plain_form import row_lengths
from ...context.loaded_sae import LoadedSae
from .task_and_probes import Chosen, Task, Training, choose_latents, fit_probe

SILENT = 1e-8
MIN_COSINE_FULL = 0.025
MIN_COSINE_FRACTION = 0.1
MIN_SHARE = 0.4


def absorption(
    acts_BF: Tensor, x_BD: Tensor, W_dec_FD: Tensor, direction_D: Tensor, own: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """For each word, how much of the feature along `direction_D` is absorbed from its own latents (float64 [B], 0 to
    1), and whether one latent absorbed all of it (bool [B])."""
    direction_D = functional.normalize(direction_D, dim=0)
    cosines_F = functional.cosine_similarity(direction_D, W_dec_FD, dim=-1)
    parts_BF = acts_BF * cosines_F
    whole_B = (x_BD @ direction_D).double()
    is_full = _is_full(acts_BF, parts_BF, whole_B, cosines_F, own)
    return _fractions(parts_BF, whole_B, cosines_F, own), is_full


def _fractions(parts_BF: Tensor, whole_B: Tensor, cosines_F: Tensor, own: Sequence[int]) -> Tensor:
    """The share that absorbers have in what they and the letter's own latents carry; 0 where they carry too little.
    Absorbers are the three other latents along the probe with the largest parts."""
    own_B = parts_BF[:, list(own)].sum(1).double()
    may_absorb_F = cosines_F >= MIN_COSINE_FRACTION
    may_absorb_F[list(own)] = False
    candidates_BF = torch.where(may_absorb_F, parts_BF, 0.0).clamp(min=0)
    absorbed_B = candidates_BF.topk(min(3, parts_BF.shape[1]), dim=1).values.sum(1).double()
    counts = (own_B < whole_B) & (absorbed_B / whole_B >= MIN_SHARE)
    taken_B = torch.minimum(absorbed_B, whole_B - own_B)
    fraction_B = torch.where(own_B <= 0, 1.0, (taken_B / (taken_B + own_B)).clamp(0, 1))
    return torch.where(counts, fraction_B, 0.0)


def _is_full(acts_BF: Tensor, parts_BF: Tensor, whole_B: Tensor, cosines_F: Tensor, own: Sequence[int]) -> Tensor:
    """The letter's own latents are silent, and one latent that points along the probe carries enough alone."""
    top_B, latent_B = parts_BF.max(1)
    silent_B = (acts_BF[:, list(own)] < SILENT).all(1)
    aligned_B = cosines_F[latent_B] >= MIN_COSINE_FULL
    return silent_B & aligned_B & (whole_B >= 0) & (top_B.double() / whole_B >= MIN_SHARE)


@dataclass(frozen=True)
class LetterResult:
    """A letter's latents, how many of its words were absorbed, and how far."""

    letter: str
    latents: tuple[int, ...]
    words: int
    fraction_sum: float
    full: int
    converged: tuple[bool, ...]
    """Whether each regression that chose its latents did."""
    fires: bool
    """Whether any latent does on its words: an SAE without firing latents absorbs nothing."""

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
    training: Training
    max_k: int
    jump: float


def measure_letters(
    task: Task, subject: LoadedSae, letters: Sequence[int], sparse: Sparse, generator: torch.Generator
) -> list[LetterResult]:
    """One result for each letter that the probe finds in some test word."""
    latents, right = letter_latents(task, subject, letters, sparse, generator), task.probes[subject.layer].found
    return [
        _measure(task, subject, letter, latents[letter], found)
        for letter in letters
        if len(found := (right & (task.test.labels == letter)).nonzero().view(-1))
    ]


def letter_latents(
    task: Task, subject: LoadedSae, letters: Sequence[int], sparse: Sparse, generator: torch.Generator
) -> dict[int, Chosen]:
    """The latents that stand for each letter."""
    train, lengths = task.train, row_lengths(subject.sae.W_dec)
    rows = torch.arange(len(train.words), device=train.labels.device)
    probe = fit_probe(
        rows[:, None].to(torch.float32),
        train.labels,
        len(task.classes.names),
        sparse.training,
        generator,
        encode=lambda numbers: train.reading.acts_of(subject, numbers.view(-1).long()) * lengths,
        width=subject.width,
    )
    ranked = probe.weights.topk(min(sparse.max_k, subject.width), dim=1).indices  # by signed weight
    latents, halves = ranked[list(letters)].unique(), (task.train, task.test)
    columns = [(half.reading.columns_of(subject, latents) * lengths[latents]).cpu().numpy() for half in halves]

    def choose(letter: int) -> Chosen:
        places = torch.searchsorted(latents, ranked[letter]).cpu().numpy()
        (train_NK, is_train), (test_NK, is_test) = (
            (table[:, places], half.is_of(letter)) for table, half in zip(columns, halves, strict=True)
        )
        return choose_latents(ranked[letter].tolist(), train_NK, is_train, test_NK, is_test, sparse.jump)

    return {letter: choose(letter) for letter in letters}


def mean_metrics(results: Sequence[LetterResult]) -> dict[str, float]:
    """SAEBench's means over letters, with sample standard deviations, 0 for a single letter."""
    found = [result.to_json() for result in results]
    columns = {
        "absorption_fraction_score": [row["mean_absorption_fraction"] for row in found],
        "full_absorption_score": [row["full_absorption_rate"] for row in found],
        "num_split_features": [row["num_split_features"] for row in found],
    }
    means = {f"mean_{name}": fmean(values) for name, values in columns.items()}
    deviations = {f"std_dev_{name}": stdev(values) if len(values) > 1 else 0.0 for name, values in columns.items()}
    return means | deviations


def _measure(task: Task, subject: LoadedSae, letter: int, chosen: Chosen, found: Tensor) -> LetterResult:
    own, converged = chosen
    probe, again = task.probes[subject.layer], task.again[subject.layer]
    places = (probe.found.cumsum(0) - 1)[found]
    direction = probe.probe.weights[letter]
    x_BD = again.x[subject.layer][places]
    with torch.no_grad():
        W_dec = subject.sae.W_dec
        acts_BF = again.acts_of(subject, places) * row_lengths(W_dec)
        fraction, full = absorption(acts_BF, x_BD, W_dec, direction, own)
    name = task.classes.names[letter]
    fires = bool((acts_BF > 0).any())
    return LetterResult(name, own, len(found), float(fraction.sum()), int(full.sum()), converged, fires)
