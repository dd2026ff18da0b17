"""Firing counters against a plain count."""

from __future__ import annotations

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
