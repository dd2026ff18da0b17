"""Documents to splits: by their text alone, in the promised shares."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saemill.cache_schema.splits import PER_MILLE, share_windows, split_of


def test_known_documents_stay_where_they_are():
    """The mapping is part of what a store is: a change here would move documents between splits."""
    assert [split_of(f"document {i}") for i in (0, 1, 5, 15)] == ["validation", "train", "test", "validation"]


def test_shares_are_those_promised():
    counts = Counter(split_of(f"document {i}") for i in range(20_000))
    for name, share in PER_MILLE.items():
        assert counts[name] == pytest.approx(20 * share, rel=0.12)


@given(st.integers(3, 10**7))
def test_windows_are_shared_out_completely(total: int):
    shares = share_windows(total)
    assert sum(shares.values()) == total
    assert min(shares.values()) >= 1
    assert list(shares) == ["train", "validation", "test"]
    if total >= 25:
        assert shares["test"] == shares["validation"] == total * 40 // 1000
