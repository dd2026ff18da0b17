"""Full-width probes: how they start, what picks their epoch, what they find."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saemill.evaluate.evals.probing.fit_probes import (
    FULL_WIDTH,
    Training,
    fresh_probe,
    probe_every_class,
    train_probe,
)
from saemill.evaluate.evals.probing.pooled_features import Features, seeded

from .conftest import features_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_probe_is_what_a_linear_layer_would_be(dtype):
    before = torch.get_rng_state()
    probe = fresh_probe(37, dtype, seeded(5))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5)
    layer = nn.Linear(37, 1, dtype=dtype)
    assert torch.equal(probe.weight, layer.weight)
    assert torch.equal(probe.bias, layer.bias)


def classes_of(seed: int, shift: float, rows: int = 60, width: int = 8) -> Features:
    generator = seeded(seed)
    found = {name: torch.randn(rows, width, generator=generator) for name in "abc"}
    for column, x in enumerate(found.values()):
        x[:, column] += shift
    return features_of(found)


def test_classes_far_apart_are_told_apart():
    _, accuracies = probe_every_class(classes_of(0, 8.0, rows=400), classes_of(1, 8.0), FULL_WIDTH, seeded(0))
    assert all(value > 0.9 for value in accuracies.values())


def test_the_best_epoch_on_test_rows_flatters_and_held_out_rows_do_not():
    """Where there is nothing to learn, the protocol's accuracy is still above chance."""
    train, test = classes_of(0, 0.0, rows=40), classes_of(1, 0.0, rows=40)
    flattered, honest = (
        sum(probe_every_class(train, test, FULL_WIDTH, seeded(seed), validated=validated)[1]["a"] for seed in range(30))
        / 30
        for validated in (False, True)
    )
    assert flattered > honest + 0.02
    assert abs(honest - 0.5) < 0.04


def test_a_validated_probe_does_not_depend_on_test_texts():
    train = classes_of(0, 1.0)
    one, _ = probe_every_class(train, classes_of(1, 1.0), FULL_WIDTH, seeded(0), validated=True)
    other, _ = probe_every_class(train, classes_of(2, -3.0), FULL_WIDTH, seeded(0), validated=True)
    assert all(torch.equal(one[name].weight, other[name].weight) for name in "abc")


def test_the_probe_of_the_best_epoch_is_returned():
    generator = seeded(0)
    x, labels = torch.randn(64, 4, generator=generator), (torch.arange(64) % 2).int()
    probe, accuracy = train_probe((x, labels), (x, labels), Training(epochs=15, lr=0.3), seeded(1))
    assert probe.accuracy(x, labels) == accuracy
    assert not probe.weight.requires_grad


def test_patience_ends_training():
    draws = []

    def left(patience: int) -> int:
        generator = seeded(0)
        x, labels = torch.zeros(20, 2), (torch.arange(20) % 2).int()
        train_probe((x, labels), (x, labels), Training(epochs=30, patience=patience), generator)
        return int(torch.randint(1 << 30, (), generator=generator))

    draws = [left(3), left(30)]
    assert draws[0] != draws[1]  # fewer epochs drew fewer permutations


def test_a_penalty_shrinks_what_is_of_no_use():
    x = torch.randn(200, 10, generator=seeded(0))
    labels = (x[:, 0] > 0).int()
    plain, penalised = (
        train_probe((x, labels), (x, labels), Training(20, 40, 1e-2, 40, l1_penalty=penalty), seeded(1))[0]
        for penalty in (0.0, 0.1)
    )
    assert penalised.weight[0, 1:].abs().sum() < 0.5 * plain.weight[0, 1:].abs().sum()
