"""Moments: merged under any split they are numpy's, and no order of work leaves a trace."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saemill.cache_schema import Store, StoreWriter
from saemill.cache_schema.layout import moment_columns
from saemill.cache_schema.moments import from_line, is_special, measure, merge, to_line


@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(1, 11), max_size=5), special=st.floats(0, 1))
def test_merged_moments_are_numpys_under_any_split(seed, cuts, special):
    rng = np.random.default_rng(seed)
    resid_WTD = (rng.standard_normal((12, 5, 3)) * 10 + 4).astype(np.float32)
    is_special_WT = rng.random((12, 5)) < special
    edges = [0, *sorted(set(cuts)), 12]
    pieces = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
    found = merge(measure(resid_WTD[piece], is_special_WT[piece]) for piece in pieces)

    kept = resid_WTD[~is_special_WT].astype(np.float64)
    norms = np.linalg.norm(resid_WTD.astype(np.float64), axis=2)
    assert (found.count, found.windows) == (len(kept), 12)
    np.testing.assert_allclose(found.norm_by_position, norms.mean(axis=0), rtol=1e-12)
    if len(kept):
        np.testing.assert_allclose(found.mean, kept.mean(axis=0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.mean_norm, norms[~is_special_WT].mean(), rtol=1e-12)
        np.testing.assert_allclose(found.mean_square_norm, (kept**2).sum(axis=1).mean(), rtol=1e-12)


def test_a_large_mean_does_not_swallow_the_variance():
    """Sums of squares would lose all digits of the mean here; pairwise means do not."""
    rng = np.random.default_rng(0)
    resid = (1e4 + rng.standard_normal((64, 8, 4))).astype(np.float32)
    nothing = np.zeros((1, 8), bool)
    found = merge(measure(window[None], nothing) for window in resid)
    np.testing.assert_allclose(found.mean, resid.astype(np.float64).mean(axis=(0, 1)), rtol=1e-14)
    expected = resid.astype(np.float64).var(axis=(0, 1)).sum()
    assert found.total_variance == pytest.approx(expected, rel=1e-5)


@given(seed=st.integers(0, 2**32 - 1))
def test_a_line_holds_all_of_the_moments(seed):
    rng = np.random.default_rng(seed)
    moments = measure(rng.standard_normal((3, 5, 4)).astype(np.float32), rng.random((3, 5)) < 0.3)
    again = from_line(to_line(moments), context=5)
    for name in vars(moments):
        np.testing.assert_array_equal(getattr(again, name), getattr(moments, name), err_msg=name)


def test_columns_of_a_line_are_where_the_layout_says(rng):
    moments = measure(rng.standard_normal((3, 5, 4)).astype(np.float32), np.zeros((3, 5), bool))
    line = to_line(moments)
    columns = moment_columns(5, 4)
    assert max(stop for _, stop in columns.values()) == len(line)
    for name, (start, stop) in columns.items():
        np.testing.assert_array_equal(line[start:stop], np.atleast_1d(getattr(moments, name)), err_msg=name)


def test_special_tokens_are_found():
    assert is_special(np.array([[0, 2], [7, 1]], np.uint32), (2, 7)).tolist() == [[False, True], [True, False]]
    assert not is_special(np.array([[0]], np.uint32), ()).any()


def test_merging_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one shard"):
        merge([])


def test_commit_order_leaves_no_trace(synthetic, tmp_path):
    """Shards in any order by several writers: the same files, and so the same statistics to the bit."""
    manifest = synthetic.make_manifest()
    corpus = synthetic.write_store(tmp_path / "straight", manifest)
    order = np.random.default_rng(0).permutation(manifest.shards).tolist()
    for shards in (order[:2], order[2:5], order[5:]):
        with StoreWriter.create(tmp_path / "shuffled", manifest, corpus.tokens, corpus.documents) as writer:
            synthetic.write_pending(writer, corpus, shards)
    assert synthetic.tree_of(tmp_path / "shuffled") == synthetic.tree_of(tmp_path / "straight")
    with Store.open(tmp_path / "shuffled") as one, Store.open(tmp_path / "straight") as two:
        assert one.moments(3).mean.tobytes() == two.moments(3).mean.tobytes()
