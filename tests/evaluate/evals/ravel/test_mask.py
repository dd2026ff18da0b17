"""The latent mask finds a planted subspace: swapping it moves one attribute and leaves the other."""

from __future__ import annotations

import torch

from saemill.evaluate.evals.ravel.swapper import LatentMask, mixed, temperatures

# Latents 0-1 say attribute A (values 0, 1), latents 2-3 attribute B (tokens 2, 3), latents 4-5 nothing.
ATTRIBUTE_A, ATTRIBUTE_B, REST = slice(0, 2), slice(2, 4), slice(4, 6)


def planted_codes(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    codes = torch.zeros(len(a), 6)
    codes[torch.arange(len(a)), a] = 1
    codes[torch.arange(len(b)), 2 + b] = 1
    codes[:, REST] = 0.5
    return codes


def predict_for(asks_a: torch.Tensor):
    """Logits of a model that reads attribute A where it is asked for A, and else B."""

    def predict(codes: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(codes), 4), -10.0)
        for_a, for_b = logits.clone(), logits.clone()
        for_a[:, ATTRIBUTE_A] = 10 * codes[:, ATTRIBUTE_A]
        for_b[:, ATTRIBUTE_B] = 10 * codes[:, ATTRIBUTE_B]
        return torch.where(asks_a[:, None], for_a, for_b)

    return predict


def test_a_planted_subspace_is_found_and_gives_cause_and_isolation_of_one():
    generator = torch.Generator().manual_seed(0)
    size, steps = 16, 60
    mask = LatentMask(6, lr=0.05)
    for temperature in temperatures(steps, torch.float32):
        base, source = (torch.randint(2, (2, size), generator=generator) for _ in range(2))
        asks_a = torch.arange(size) % 2 == 0
        targets = torch.where(asks_a, source[0], 2 + base[1])
        mask.step(planted_codes(*base), planted_codes(*source), targets, temperature, predict_for(asks_a))
    assert mask.chosen()[ATTRIBUTE_A].all()
    assert not mask.chosen()[ATTRIBUTE_B].any()

    base, source = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1, 0], [1, 0]])
    swapped = mixed(planted_codes(*base), planted_codes(*source), mask.chosen())
    assert predict_for(torch.tensor([True, True]))(swapped).argmax(-1).tolist() == [1, 0]  # the source's A
    assert predict_for(torch.tensor([False, False]))(swapped).argmax(-1).tolist() == [2, 3]  # the base's own B


def test_temperatures_fall_on_a_log_scale_from_1_to_a_ten_thousandth():
    assert torch.allclose(torch.tensor(temperatures(5, torch.float32)), torch.tensor([1, 0.1, 0.01, 1e-3, 1e-4]))


def test_an_untrained_mask_swaps_nothing_and_mixes_half():
    mask = LatentMask(3, lr=1e-3)
    assert not mask.chosen().any()
    base, source = torch.zeros(1, 3), torch.ones(1, 3)
    assert mixed(base, source, torch.sigmoid(mask.values.detach())).tolist() == [[0.5, 0.5, 0.5]]
