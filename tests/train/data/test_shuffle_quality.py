"""Shares of pairs against counting them one by one."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saemill.cache_schema.token_counts_and_summary import pair_share
from saemill.train.data.shuffle_order import ShuffleQuality, count_pairs


@given(st.lists(st.integers(0, 5), max_size=30))
def test_pairs_equal_counting_each(labels):
    pairs = list(combinations(labels, 2))
    assert count_pairs(np.array(labels, np.int64)) == (sum(a == b for a, b in pairs), len(pairs))


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30))
def test_the_ideal_is_the_share_over_everything(labels):
    same, pairs = count_pairs(np.array(labels))
    assert pair_share(np.bincount(labels)) == pytest.approx(same / pairs)


def test_a_shuffled_batch_has_a_ratio_near_one_and_a_run_of_text_has_not():
    labels = np.repeat(np.arange(50), 200)
    ideal = pair_share(np.bincount(labels))
    shuffled = ShuffleQuality(ideal).with_batch(np.random.default_rng(0).permutation(labels)[:2000])
    assert shuffled.ratio == pytest.approx(1.0, abs=0.1)
    assert ShuffleQuality(ideal).with_batch(labels[:2000]).ratio > 4


def test_documents_of_one_token_are_no_division_by_zero():
    assert ShuffleQuality(pair_share(np.ones(9))).with_batch(np.arange(5)).ratio == 1.0
    assert pair_share(np.zeros(0)) == 0.0
