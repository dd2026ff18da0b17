"""Probes of a class: a linear one on every feature, trained by AdamW and kept at its best epoch, or one on k features.

SAEBench judges epochs by the test rows and reports the best. `train_probe` takes the judging rows as an argument, so
that corrected numbers can use rows held out of training. The generator draws the initial weights, then one permutation
for each epoch. B rows, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...model.logistic_regression import fitted, has_converged
from .pooled_features import Draw, Features, draw_probe

HELD_OUT = 5  # one training row in five judges the epochs of a validated probe


@dataclass(frozen=True)
class Training:
    batch_size: int = 250
    epochs: int = 100
    lr: float = 1e-2
    patience: int = 10
    l1_penalty: float = 0.0


FULL_WIDTH = Training()


@dataclass(frozen=True, eq=False)
class LinearProbe:
    weight: Tensor  # [1, F]
    bias: Tensor  # [1]

    def logits(self, x_BF: Tensor) -> Tensor:
        return functional.linear(x_BF, self.weight, self.bias).squeeze(-1)

    @torch.no_grad()
    def accuracy(self, x_BF: Tensor, labels_B: Tensor, batch_size: int = 500) -> float:
        hits = [
            ((self.logits(x) > 0).long() == labels).float()
            for x, labels in zip(x_BF.split(batch_size), labels_B.split(batch_size), strict=True)
        ]
        return torch.cat(hits).mean().item()


def fresh_probe(width: int, dtype: torch.dtype, generator: torch.Generator) -> LinearProbe:
    """Initialised like `nn.Linear`, but from the given generator."""
    weight = torch.empty(1, width, dtype=dtype)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(width)
    bias = torch.empty(1, dtype=dtype).uniform_(-bound, bound, generator=generator)
    return LinearProbe(weight, bias)


@torch.enable_grad()
def train_probe(
    train: tuple[Tensor, Tensor], judge: tuple[Tensor, Tensor], training: Training, generator: torch.Generator
) -> tuple[LinearProbe, float]:
    """The probe at the epoch that is best on the judging rows, and its accuracy there."""
    x_BF, labels_B = train
    fresh = fresh_probe(x_BF.shape[1], x_BF.dtype, generator)
    probe = LinearProbe(fresh.weight.to(x_BF.device).requires_grad_(), fresh.bias.to(x_BF.device).requires_grad_())
    optimizer = torch.optim.AdamW([probe.weight, probe.bias], lr=training.lr)
    best, best_accuracy, waited = probe, 0.0, 0
    for _ in range(training.epochs):
        order = torch.randperm(len(x_BF), generator=generator).to(x_BF.device)
        for rows in order.split(training.batch_size):
            optimizer.zero_grad()
            _loss(probe, x_BF[rows], labels_B[rows], training.l1_penalty).backward()
            optimizer.step()
        accuracy = probe.accuracy(*judge, training.batch_size)
        if accuracy > best_accuracy:
            best, best_accuracy, waited = _copied(probe), accuracy, 0
        else:
            waited += 1
        if waited >= training.patience:
            break
    return _copied(best), best_accuracy


def probe_every_class(
    train: Features,
    test: Features,
    training: Training,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    opposites: Mapping[str, str] | None = None,
    validated: bool = False,
) -> tuple[dict[str, LinearProbe], dict[str, float]]:
    """Probes and test accuracies of all classes, in order. As in SAEBench, test rows judge the epochs; if `validated`,
    held-out training rows do, and test rows are seen once."""

    def rows_of(features: Features, name: str) -> tuple[Tensor, Tensor]:
        draw = draw_probe(features.spans, name, generator, (opposites or {}).get(name))
        return features.dense(draw).to(device), torch.from_numpy(draw.labels).to(device)

    probes, accuracies = dict[str, LinearProbe](), dict[str, float]()
    for name in train.spans:
        (x_BF, labels_B), tested = rows_of(train, name), rows_of(test, name)
        if validated:
            held_out = len(x_BF) // HELD_OUT
            judge, rest = (x_BF[:held_out], labels_B[:held_out]), (x_BF[held_out:], labels_B[held_out:])
            probes[name], _ = train_probe(rest, judge, training, generator)
            accuracies[name] = probes[name].accuracy(*tested)
        else:
            probes[name], accuracies[name] = train_probe((x_BF, labels_B), tested, training, generator)
    return probes, accuracies


def _loss(probe: LinearProbe, x_BF: Tensor, labels_B: Tensor, l1_penalty: float) -> Tensor:
    loss = functional.binary_cross_entropy_with_logits(probe.logits(x_BF), labels_B.to(x_BF.dtype))
    return loss + l1_penalty * probe.weight.abs().sum() if l1_penalty else loss


def _copied(probe: LinearProbe) -> LinearProbe:
    return LinearProbe(probe.weight.detach().clone(), probe.bias.detach().clone())


MAX_ITERATIONS = 1000


def top_features(train: Features, draw: Draw, k: int) -> np.ndarray:
    """The k features with the largest difference of means, in ascending order."""
    return np.sort(torch.argsort(train.contrast(draw).abs(), descending=True)[:k].numpy())


def sparse_accuracy(train: Features, train_draw: Draw, test: Features, test_draw: Draw, k: int) -> tuple[float, bool]:
    """Share of test rows that an L2-regularised logistic regression on k features gets right, and whether it
    converged."""
    chosen = top_features(train, train_draw, k)
    probe = fitted(train.columns(train_draw, chosen), train_draw.labels, C=1.0, max_iter=MAX_ITERATIONS)
    return float(probe.score(test.columns(test_draw, chosen), test_draw.labels)), has_converged(probe)
