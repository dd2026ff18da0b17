"""Places in the window: planted ranges are kept to, planted profiles are recognised."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saemill.evaluate.evals.measures import position

CONTEXT, RANGES = 16, 4


def planted(leak: float = 0.0, windows: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of latents that fire in a range of their own, and a little outside; and those ranges."""
    generator = torch.Generator().manual_seed(0)
    range_F = torch.arange(8) % RANGES
    inside = position.hard_mask(range_F, CONTEXT, RANGES).float()
    codes = torch.rand(windows, CONTEXT, 8, generator=generator) * (inside + leak * (1 - inside))
    return codes, range_F


def all_of(codes: torch.Tensor) -> torch.Tensor:
    return torch.ones(codes.shape[:2], dtype=torch.bool)


def test_a_hard_mask_retains_everything():
    codes, range_F = planted()
    seen = position.profile(codes, all_of(codes))
    assert position.retention(seen, range_F, RANGES).tolist() == pytest.approx([1.0] * 8)
    assert (position.fidelity(seen, position.hard_mask(range_F, CONTEXT, RANGES)) > 0.95).all()


def test_planted_ranges_are_assigned_and_a_leak_is_measured():
    codes, range_F = planted(leak=0.1)
    seen = position.profile(codes, all_of(codes))
    assert position.assign_ranges(seen, RANGES).tolist() == range_F.tolist()
    assert position.retention(seen, range_F, RANGES).mean() == pytest.approx(1 / 1.3, abs=0.03)


@pytest.mark.parametrize("special", [0, 1])
def test_a_latent_that_does_not_care_retains_its_share(special):
    """Also in the first range, which has the place of BOS."""
    codes = torch.rand(400, CONTEXT, 4, generator=torch.Generator().manual_seed(0))
    keep = all_of(codes)
    keep[:, :special] = False
    first, second = (position.profile(*part) for part in zip(codes.split(200), keep.split(200), strict=True))
    found = position.retention(second, position.assign_ranges(first, RANGES), RANGES)
    assert found.mean() == pytest.approx(1 / RANGES, abs=0.01)
    assert position.retention(second, torch.zeros(4, dtype=int), RANGES).mean() == pytest.approx(1 / RANGES, abs=0.01)


def test_short_windows_do_not_favour_the_first_range():
    codes, keep = torch.ones(10, CONTEXT, 1), torch.ones(10, CONTEXT, dtype=torch.bool)
    keep[1:, 4:] = False
    found = position.retention(position.profile(codes, keep), torch.tensor([0]), RANGES)
    assert found.tolist() == pytest.approx([0.25])


def test_unbound_latents_keep_to_their_range_everywhere():
    codes, _ = planted()
    free = torch.full((8,), position.ANYWHERE)
    assert position.retention(position.profile(codes, all_of(codes)), free, RANGES).tolist() == [1.0] * 8
    assert (position.hard_mask(free, CONTEXT, RANGES) == 1).all()


def test_fidelity_is_the_correlation_that_numpy_gives():
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.random((5, CONTEXT, 3)))
    mask = position.soft_mask(torch.tensor([2.0, 8.0, 15.0]), CONTEXT / 8, CONTEXT)
    found = position.fidelity(position.profile(codes, all_of(codes)), mask)
    expected = [np.corrcoef(codes[:, :, f].mean(0), mask[:, f])[0, 1] for f in range(3)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)


def test_a_planted_bell_is_recognised_and_a_flat_profile_has_no_shape():
    mask = position.soft_mask(torch.tensor([4.0, 12.0]), 2.0, CONTEXT)
    codes = torch.cat([mask, torch.ones(CONTEXT, 1)], dim=1)[None]
    seen = position.profile(codes, all_of(codes))
    found = position.fidelity(seen, torch.cat([mask, mask[:, :1]], dim=1))
    assert found[:2].tolist() == pytest.approx([1.0, 1.0])
    assert found[2].isnan()


@given(st.integers(1, 200), st.integers(1, 8))
def test_ranges_are_even_and_in_order(context, ranges):
    found = position.equal_shares(context, ranges)
    assert (found.diff() >= 0).all()
    if context >= ranges:
        assert found.unique().tolist() == list(range(ranges))


def test_special_tokens_have_no_profile():
    codes = torch.ones(2, CONTEXT, 1)
    keep = all_of(codes)
    keep[:, 0] = False
    seen = position.profile(codes, keep)
    assert seen.tokens.tolist() == [0.0] + [2.0] * (CONTEXT - 1)
    assert float(seen.mass[0, 0]) == 0.0


def test_batches_add_up_in_one_table():
    """Of 262,144 latents in windows of 1,024 tokens it takes 2 GB; there were six of them."""
    codes = torch.randint(0, 4, (6, CONTEXT, 8), generator=torch.Generator().manual_seed(0)).float()
    keep = torch.rand(6, CONTEXT, generator=torch.Generator().manual_seed(1)) < 0.8
    whole, first = position.profile(codes, keep), position.profile(codes[:4], keep[:4])
    table = first.mass.data_ptr()
    both = position.profile(codes[4:], keep[4:], first)
    assert both.mass.data_ptr() == table and both.mass.equal(whole.mass)
    assert both.firings.equal(((codes > 0) & keep[:, :, None]).sum((0, 1))) and both.firings.shape == (8,)
    assert both.tokens.tolist() == keep.sum(0).tolist()
