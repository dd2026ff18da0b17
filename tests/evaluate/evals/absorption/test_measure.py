"""Absorption against planted truths and a word-by-word oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saemill.evaluate.evals.absorption.measure_absorption import absorption

DIRECTION = torch.tensor([1.0, 0.0, 0.0])
# Latent 0 is the letter's own; 1 is a word that also points along the letter; 2 points elsewhere.
W_DEC = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])


def planted(acts: list[float]) -> tuple[float, bool]:
    codes = torch.tensor([acts])
    fraction, full = absorption(codes, codes @ W_DEC, W_DEC, DIRECTION, own=[0])
    return fraction.item(), bool(full.item())


def test_a_letter_carried_by_its_own_latent_is_not_absorbed():
    assert planted([2.0, 0.0, 1.0]) == (0.0, False)


def test_a_letter_carried_by_a_word_alone_is_absorbed_fully():
    assert planted([0.0, 2.0, 1.0]) == (1.0, True)


def test_a_letter_carried_by_both_is_absorbed_in_part():
    fraction, full = planted([0.5, 1.25, 0.0])  # parts 0.5 and 1.0 of 1.5
    assert fraction == pytest.approx(1.0 / 1.5)
    assert not full


def test_a_small_part_does_not_count():
    assert planted([2.0, 1.25, 0.0])[0] == 0.0  # 1 of 3, under 40 %


def test_a_residual_that_does_not_point_along_the_probe_is_not_absorbed():
    codes = torch.tensor([[0.0, 1.0, 0.0]])
    fraction, full = absorption(codes, torch.tensor([[-1.0, 0.0, 0.0]]), W_DEC, DIRECTION, own=[0])
    assert (fraction.item(), bool(full.item())) == (0.0, False)


def slow(acts, x, W_dec, direction, own):
    """One word, as the definition reads."""
    direction = direction / direction.norm()
    cosines = [float(torch.nn.functional.cosine_similarity(direction, row, dim=0)) for row in W_dec]
    parts = [float(act) * cosine for act, cosine in zip(acts, cosines, strict=True)]
    whole = float(x @ direction)
    main = sum(parts[i] for i in own)
    others = sorted((parts[i] for i in range(len(parts)) if i not in own and cosines[i] >= 0.1), reverse=True)
    absorbed = sum(part for part in others[:3] if part > 0)
    if main >= whole or absorbed / whole < 0.4:
        fraction = 0.0
    elif main <= 0:
        fraction = 1.0
    else:
        taken = min(absorbed, whole - main)
        fraction = min(max(taken / (taken + main), 0.0), 1.0)
    top = max(range(len(parts)), key=parts.__getitem__)
    full = all(acts[i] < 1e-8 for i in own) and cosines[top] >= 0.025 and whole >= 0 and parts[top] / whole >= 0.4
    return fraction, bool(full)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True))
def test_all_words_at_once_are_what_each_is_alone(seed, own):
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(8, 4, generator=generator), dim=1)
    acts = (torch.randn(20, 8, generator=generator) - 0.5).relu()
    x = acts @ W_dec + 0.1 * torch.randn(20, 4, generator=generator)
    direction = torch.randn(4, generator=generator)
    fractions, are_full = absorption(acts, x, W_dec, direction, own)
    for i in range(20):
        fraction, full = slow(acts[i], x[i], W_dec, direction, own)
        assert fractions[i].item() == pytest.approx(fraction, abs=1e-4)
        assert bool(are_full[i]) == full
