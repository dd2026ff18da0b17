"""Documents to splits: by their text alone, in the promised shares."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saemill.cache_schema.splits import EVALUATION_TOKENS, PER_MILLE, per_mille_for_tests, share_windows, split_of


def test_known_documents_stay_where_they_are():
    """The mapping is part of what a store is: a change here would move documents between splits."""
    assert [split_of(f"document {i}") for i in (0, 1, 5, 15)] == ["validation", "train", "test", "validation"]


def test_shares_are_those_promised():
    counts = Counter(split_of(f"document {i}") for i in range(20_000))
    for name, share in PER_MILLE.items():
        assert counts[name] == pytest.approx(20 * share, rel=0.12)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        (1, 40),
        (600_000, 40),
        (1_100_000, 40),
        (2_000_000, 125),
        (10_000_000, 225),
        (20_000_000, 226),
        (10**8, 46),
        (10**9, 40),
    ],
)
def test_a_new_store_tests_on_what_evaluations_need_but_on_a_quarter_at_most(tokens: int, share: int):
    assert per_mille_for_tests(tokens) == share
    tests = share_windows(tokens // 128, share)["test"] * 128 if tokens > 1000 else 0
    assert tests <= max(0.041 * tokens, EVALUATION_TOKENS * 1.03)


def test_a_larger_test_split_takes_documents_from_train_alone():
    texts = [f"document {i}" for i in range(20_000)]
    small, large = ([split_of(text, test) for text in texts] for test in (40, 225))
    assert Counter(large)["test"] == pytest.approx(20 * 225, rel=0.06)
    moved = {pair for pair in zip(small, large, strict=True) if pair[0] != pair[1]}
    assert moved == {("train", "test")}
    assert split_of(texts[0]) == split_of(texts[0], 40)


@given(st.integers(3, 10**7))
def test_windows_are_shared_out_completely(total: int):
    shares = share_windows(total)
    assert sum(shares.values()) == total
    assert min(shares.values()) >= 1
    assert list(shares) == ["train", "validation", "test"]
    if total >= 25:
        assert shares["test"] == shares["validation"] == total * 40 // 1000
