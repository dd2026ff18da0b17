"""Tiers against planted truths: what depends, what does not, and what was composed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score, normalized_mutual_info_score

from saemill.evaluate.evals.measures import tiers
from saemill.evaluate.evals.measures.position import equal_shares


def labels(seed: int, count: int, kinds: int) -> torch.Tensor:
    return torch.randint(-1, kinds, (count,), generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10_000), st.integers(2, 300), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_mutual_information_is_that_of_scikit_learn(seed, count, kinds, others):
    first, second = labels(seed, count, kinds), labels(seed + 1, count, others)
    assert tiers.mutual_information(first, second) == pytest.approx(mutual_info_score(first, second), abs=1e-9)
    expected = normalized_mutual_info_score(first, second)
    if len(first.unique()) > 1 and len(second.unique()) > 1:
        assert tiers.normalised_mutual_information(first, second) == pytest.approx(expected, abs=1e-9)


def test_chance_is_taken_off():
    """Two independent labellings with many labels: plain NMI says half, the adjusted one nothing."""
    first, second = labels(0, 600, 90), labels(1, 600, 90)
    adjusted = tiers.adjusted_mutual_information(first, second, torch.Generator().manual_seed(0))
    assert tiers.normalised_mutual_information(first, second) > 0.4
    assert abs(adjusted) < 0.03
    tangled = torch.where(torch.arange(600) % 2 == 0, first, second)
    found = tiers.adjusted_mutual_information(first, tangled, torch.Generator().manual_seed(0))
    assert found == pytest.approx(adjusted_mutual_info_score(first, tangled), abs=0.03)


def test_a_tier_that_follows_another_has_information_one():
    codes = torch.zeros(400, 8)
    pick = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(0))
    codes[torch.arange(400), pick] = 1.0
    codes[torch.arange(400), 4 + (pick + 1) % 4] = 2.0
    first, second = tiers.dominant_latents(codes, equal_shares(8, 2), 2).T
    assert tiers.normalised_mutual_information(first, second) == pytest.approx(1.0)


def test_the_dominant_latent_is_the_strongest_or_none():
    codes = torch.tensor([[0.0, 3.0, 1.0, 0.0], [0.0, 0.0, 0.0, 5.0], [2.0, 1.0, 0.0, 0.0]])
    assert tiers.dominant_latents(codes, torch.tensor([0, 0, 1, 1]), 2).tolist() == [[1, 2], [-1, 3], [0, -1]]


def test_a_constant_labelling_shares_nothing():
    constant, other = torch.zeros(50, dtype=torch.int64), labels(0, 50, 5)
    assert tiers.normalised_mutual_information(constant, constant) == 0.0
    assert tiers.adjusted_mutual_information(constant, other, torch.Generator()) == pytest.approx(0.0)


@given(st.integers(1, 60), st.integers(1, 7))
def test_equal_tiers_are_nested_and_even(width, count):
    found = equal_shares(width, count)
    assert (found.diff() >= 0).all()
    sizes = torch.bincount(found, minlength=count)
    assert len(sizes) == count
    assert int(sizes.max() - sizes.min()) <= 1


def test_activity_adds_up_over_batches():
    generator = torch.Generator().manual_seed(0)
    codes = torch.relu(torch.randn(64, 9, generator=generator) - 1)
    codes[:, 8] = 0
    membership = equal_shares(9, 3)
    whole = tiers.tier_activity(codes, membership, 3)
    parts = tiers.tier_activity(codes[:20], membership, 3) + tiers.tier_activity(codes[20:], membership, 3)
    for tier in range(3):
        mine = codes[:, membership == tier]
        found = parts.of_tier(membership == tier, tier)
        assert found == pytest.approx(whole.of_tier(membership == tier, tier))
        assert found["l0"] == pytest.approx(float((mine > 0).sum(1).double().mean()))
        assert found["active_share"] == pytest.approx(float((mine > 0).double().mean()))
        assert found["awake_share"] == pytest.approx(float((mine > 0).any(1).double().mean()))
        assert found["mass_share"] == pytest.approx(float(mine.sum() / codes.sum()))
    assert parts.of_tier(membership == 2, 2)["silent_latent_share"] == pytest.approx(1 / 3)


def test_an_empty_tier_and_no_tokens_are_zeros():
    nothing = tiers.tier_activity(torch.zeros(0, 4), torch.zeros(4, dtype=torch.int64), 2)
    assert set(nothing.of_tier(torch.zeros(4, dtype=torch.bool), 1).values()) == {0.0}


@pytest.mark.parametrize(("atoms", "width"), [(6, 12), (12, 12), (40, 10)])
def test_the_fit_is_that_of_nnls(atoms, width, monkeypatch):
    monkeypatch.setattr(tiers, "ITERATIONS", 3000)
    rng = np.random.default_rng(atoms)
    basis, rows = rng.standard_normal((atoms, width)), rng.standard_normal((20, width))
    found = tiers.fit_all(torch.from_numpy(rows), torch.from_numpy(basis))
    assert (found >= 0).all()
    errors = (torch.from_numpy(rows) - found @ torch.from_numpy(basis)).norm(dim=1).numpy()
    np.testing.assert_allclose(errors, [nnls(basis.T, row)[1] for row in rows], atol=2e-4)


def test_planted_sums_are_found_and_their_parts_named():
    generator = torch.Generator().manual_seed(1)
    atoms = tiers.random_rows(torch.ones(30, 64), generator)
    parts = torch.stack([torch.randperm(30, generator=generator)[:3] for _ in range(12)])
    rows = atoms[parts].sum(1)
    assert tiers.explained(rows, tiers.fit_all(rows, atoms) @ atoms).min() > 0.999
    chosen, weights = tiers.fit_few(rows, atoms, parts=3)
    assert (chosen.sort(1).values == parts.sort(1).values).double().mean() > 0.9
    assert tiers.explained_by_few(rows, atoms, 3).min() > 0.9
    assert (weights >= 0).all()


def test_rows_that_point_anywhere_are_no_sums_of_few():
    """With many atoms all of them explain anything: the fit of few parts is what tells."""
    generator = torch.Generator().manual_seed(2)
    atoms = tiers.random_rows(torch.ones(400, 32), generator)
    strangers = tiers.random_rows(torch.ones(20, 32), generator)
    assert tiers.explained(strangers, tiers.fit_all(strangers, atoms) @ atoms).min() > 0.95
    fewer = tiers.explained_by_few(strangers, atoms, 2)
    planted = tiers.explained_by_few(atoms[:20] + 0.5 * atoms[20:40], atoms, 2)
    assert planted.median() > fewer.median() + 0.2


def test_what_would_have_to_be_taken_away_is_not_explained():
    atoms = torch.eye(4)[:2]
    rows = torch.tensor([[-1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    found = tiers.explained(rows, tiers.fit_all(rows, atoms) @ atoms)
    assert found.tolist() == pytest.approx([0.0, 0.5], abs=1e-5)


def test_a_learned_composition_is_judged_whatever_its_length():
    atoms, learned = torch.eye(5)[:3], torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    rows = torch.tensor([[0.2, 0.0, 0.1, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    assert tiers.explained_by(learned, rows, atoms).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
