"""Moments of residuals against numpy, in one go and in parts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saemill.cache_schema.moments import is_special as numpy_is_special
from saemill.cache_schema.moments import measure as numpy_measure
from saemill.cache_schema.moments import merge, to_line
from saemill.harvest.errors import NonFiniteResidual
from saemill.harvest.stats import is_special, measure

SPECIAL = (1, 2)


def make_windows(seed: int, windows: int, context: int, d_model: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    resid = (torch.randn(windows, context, d_model, generator=generator) * 3 + 1).to(dtype)
    ids = torch.randint(1, 8, (windows, context), generator=generator)
    resid[:, 0] *= 100  # an attention sink: special, and large
    ids[:, 0] = 1
    return resid, ids


def assert_close(found, expected) -> None:
    assert (found.count, found.windows) == (expected.count, expected.windows)
    for name in ("mean", "mean_norm", "mean_square_norm", "norm_by_position"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


@given(
    seed=st.integers(0, 10**6),
    windows=st.integers(1, 9),
    context=st.integers(1, 700),  # windows are converted one at a time and several at a time
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    cuts=st.lists(st.integers(1, 8), max_size=3),
)
def test_equals_numpy_under_any_split(seed, windows, context, dtype, cuts):
    resid, ids = make_windows(seed, windows, context, 5, dtype)
    expected = numpy_measure(resid.double().numpy(), numpy_is_special(ids.numpy(), SPECIAL))
    special = is_special(ids, SPECIAL)
    edges = sorted({0, windows, *(cut for cut in cuts if cut < windows)})
    parts = [measure(19, resid[a:b], special[a:b]) for a, b in pairwise(edges)]
    assert_close(merge(parts), expected)


def test_special_tokens_count_for_positions_only():
    resid, ids = make_windows(0, 4, 6, 3)
    moments = measure(0, resid, is_special(ids, SPECIAL))
    assert moments.count == (~np.isin(ids, SPECIAL)).sum() < 24
    assert moments.norm_by_position[0] > 10 * moments.mean_norm


def test_windows_of_nothing_but_special_tokens_have_no_mean():
    moments = measure(0, torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    assert (moments.count, moments.mean_norm, moments.windows) == (0, 0.0, 2)
    assert not moments.mean.any()
    np.testing.assert_allclose(moments.norm_by_position, 2.0)


def test_the_largest_float32_is_finite():
    resid = torch.full((1, 1, 3), torch.finfo(torch.float32).max)
    assert np.isfinite(measure(0, resid, torch.zeros(1, 1, dtype=torch.bool)).mean_square_norm)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("position", [0, 5], ids=["special", "counted"])
def test_a_residual_that_is_not_finite_names_its_layer(value, position):
    resid, ids = make_windows(0, 3, 6, 4, torch.float16)
    resid[2, position, 1] = value
    with pytest.raises(NonFiniteResidual, match=f"layer 19: .* window 2 of the batch, position {position}, .* float16"):
        measure(19, resid, is_special(ids, SPECIAL))


def test_moments_of_a_large_batch_do_not_depend_on_the_number_of_threads():
    """They are in a shard's digest, and repair may run on a machine with more or fewer cores."""
    resid, ids = make_windows(0, 300, 128, 8)
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(to_line(measure(0, resid, is_special(ids, SPECIAL))).tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
