"""Shared by the tests of training: seeded tensors and the dense oracle of every sparse product."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _global_random_state_stays() -> Iterator[None]:
    """Nothing in the package may draw from the global generator."""
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture
def planted(rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows [4096, 32] that are sums of 3 of 48 unit directions, and the directions [48, 32]."""
    directions = torch.nn.functional.normalize(torch.randn(48, 32, generator=rng), dim=1)
    chosen = torch.rand(4096, 48, generator=rng).topk(3, dim=1).indices
    strength = 1.0 + torch.rand(4096, 3, generator=rng)
    codes = torch.zeros(4096, 48).scatter_(1, chosen, strength)
    rows = codes @ directions
    return rows * (32**0.5 / rows.norm(dim=1).mean()), directions
