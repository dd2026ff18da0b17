"""Two ranks with half a batch each against one with all of it, for every variant."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from saemill.train.step import Trainee
from saemill.train.variants import config_type, names
from saemill.train.view import Batch

TOKENWISE = [name for name in names() if not config_type(name)().request().windows]


class Pair:
    """Two ranks in threads of one process; a call returns when both have made it."""

    size = 2

    def __init__(self, board: list[Any], barrier: threading.Barrier, rank: int) -> None:
        self._board, self._barrier, self._rank = board, barrier, rank

    def _all(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._board[self._rank] = tensor.detach().clone()
        self._barrier.wait(timeout=60)
        everyone = list(self._board)
        self._barrier.wait(timeout=60)
        return everyone

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._all(tensor)).sum(0)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._all(tensor)).mean(0)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._all(tensor))


def half(batch: Batch, rank: int) -> Batch:
    cut = slice(rank, None, 2)
    side = {name: values[cut] for name, values in batch.side.items()}
    return Batch(batch.x[cut], None if batch.target is None else batch.target[cut], side)


@pytest.mark.parametrize("variant", TOKENWISE)
def test_two_ranks_train_as_one(battery, variant):
    config = battery.quick(variant, dead_after_tokens=1000, encoder_product="float32")
    all_batches = battery.batches(config, 6)
    alone = Trainee("one", config.build(battery.D), battery.STEPS)
    for batch in all_batches:
        alone.step(batch)

    board: list[Any] = [None, None]
    barrier = threading.Barrier(2)
    ranks = [Pair(board, barrier, rank) for rank in range(2)]
    pair = [Trainee("one", config.build(battery.D), battery.STEPS, ranks=one) for one in ranks]

    def run(rank: int) -> None:
        for batch in all_batches:
            pair[rank].step(half(batch, rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    expected, first, second = (trainee.state() for trainee in (alone, *pair))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("sae.W_enc", "sae.W_dec", "sae.b_dec"):
        assert float((first[name] - expected[name]).norm()) <= 1e-3 * float(expected[name].norm()), name
    assert torch.equal(first["latents.tokens_since_fired"], expected["latents.tokens_since_fired"])
