"""Firing counters against a plain count."""

from __future__ import annotations

import pytest
import torch

from saemill.train.engine.count_dead_latents import LatentCounters


def test_counters_equal_a_plain_count(rng):
    counters = LatentCounters(6, torch.device("cpu"))
    since = [0] * 6
    for _ in range(9):
        acts = (torch.rand(10, 6, generator=rng) < 0.05).double()
        counters.update(acts.sum(0).long(), 10)
        since = [0 if acts[:, i].any() else since[i] + 10 for i in range(6)]
    assert counters.tokens_since_fired.tolist() == since
    assert counters.dead(20).tolist() == [tokens >= 20 for tokens in since]


@pytest.mark.parametrize(
    ("width", "number", "size"), [(40, 0, 0), (40, 3, 3), (40, 17, 18), (40, 39, 40), (40, 40, 40)]
)
def test_the_list_begins_with_the_dead_and_has_one_of_few_sizes(rng, width, number, size):
    counters, dead = LatentCounters(width, torch.device("cpu")), torch.randperm(width, generator=rng)[:number]
    counters.tokens_since_fired[dead] = 100
    counters.list_dead(50, None)
    assert counters.list_length() is None
    found = counters.listed
    assert found.latents[:number].tolist() == dead.sort().values.tolist()
    assert found.is_dead.tolist() == [True] * number + [False] * (size - number)
    assert len(found.latents.unique()) == counters.list_length() == size


def test_another_list_lies_where_the_last_one_lay():
    """Recorded steps read it there."""
    counters = LatentCounters(40, torch.device("cpu"))
    places = set()
    for number in (3, 30, 7):
        counters.tokens_since_fired[:number] = 100
        counters.list_dead(50, None)
        places.add(counters.listed.latents.data_ptr())
    assert len(places) == 1
