"""One-vs-rest linear probes, all letters at once, and which latents stand for a letter.

N rows, D width, L letters, F latents, K of them.

Binary cross-entropy with positives weighted by negatives / positives, Adam, and a learning rate that falls
exponentially from epoch to epoch. With `l1_decay` the weights become sparse, for choosing latents.

The latents of a letter:
1. A probe with an L1 penalty is fitted on the latents, all letters at once.
2. For each letter its latents are ranked by weight, the largest first; negative weights rank last.
3. A logistic regression on the first k says how well k latents predict the letter, by F1 on the test words.
4. k grows while F1 gains more than a threshold over the best so far: those latents are the letter's, and
   more than one means that the feature was split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...model.logistic_regression import fitted


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
    """Fit a probe on rows, or on what `encode` makes of each batch of rows (`width` wide)."""
    targets_NL = functional.one_hot(labels_N, num_letters).to(x_ND.dtype)
    parameters = _initial(width or x_ND.shape[1], num_letters, generator, x_ND)
    optimizer = torch.optim.Adam(parameters, lr=training.lr, weight_decay=training.weight_decay)
    weights = _positive_weights(targets_NL)
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
    """Uniform in +-1 / sqrt(width), as linear layers start."""
    bound = 1 / math.sqrt(width)
    shapes = ((num_letters, width), (num_letters,))
    drawn = (torch.rand(shape, generator=generator) * 2 * bound - bound for shape in shapes)
    return [values.to(like).requires_grad_() for values in drawn]


def _positive_weights(targets_NL: Tensor) -> Tensor:
    """negatives / positives; 1 for a letter without positives, where SAEBench's infinity would spoil all."""
    positives = targets_NL.sum(0)
    ratio = (len(targets_NL) - positives) / positives
    return torch.where(positives > 0, ratio, torch.ones_like(ratio))


def ranked_latents(sparse_probe: Probe, max_k: int) -> Tensor:
    """int64 [L, K]: for each letter the latents with the largest weights (not the largest in size)."""
    return sparse_probe.weights.topk(max_k, dim=1).indices


def choose_latents(
    ranked_K: Sequence[int],
    train_NK: np.ndarray,
    is_train: np.ndarray,
    test_NK: np.ndarray,
    is_test: np.ndarray,
    jump: float,
) -> tuple[int, ...]:
    """The letter's latents; columns of the activations are those of `ranked_K`.

    No k larger than the first that does not gain enough is tried, so none is fitted either.
    """
    best = -100.0
    for k in range(1, len(ranked_K) + 1):
        f1 = _f1_of_first(k, train_NK, is_train, test_NK, is_test)
        if f1 <= best + jump:
            return tuple(ranked_K[: k - 1])
        best = f1
    return tuple(ranked_K)


def f1_score(truth: np.ndarray, claimed: np.ndarray) -> float:
    """Harmonic mean of precision and recall; 0 where nothing was found."""
    hits = int((truth & claimed).sum())
    return 2 * hits / (int(truth.sum()) + int(claimed.sum())) if hits else 0.0


def _f1_of_first(k: int, train_NK: np.ndarray, is_train: np.ndarray, test_NK: np.ndarray, is_test: np.ndarray) -> float:
    regression = fitted(train_NK[:, :k], is_train.astype(np.int64), max_iter=500, class_weight="balanced")
    return f1_score(is_test, regression.decision_function(test_NK[:, :k]) > 0.0)
