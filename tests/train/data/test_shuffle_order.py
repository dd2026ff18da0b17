"""The read order is a permutation, finds every step again, and does not depend on how it is asked."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saemill.train.data.shuffle_order import (
    Plan,
    SplitSizes,
    cut_pieces,
    share,
    token_order,
    token_slice,
    window_order,
    window_slice,
)
from saemill.train.errors import ConfigInvalid


def make_sizes(windows, context=8, first=0, shard=12, chunk=3, seed=0):
    trainable = np.random.default_rng(seed).integers(0, context + 1, windows)
    return SplitSizes(first, context, shard, chunk, trainable, 0.0, 0.0)


sizes = st.builds(
    make_sizes,
    windows=st.integers(1, 90),
    first=st.integers(0, 30),
    shard=st.sampled_from([6, 12]),
    chunk=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 5),
)


@given(sizes, st.integers(8, 400))
def test_pieces_cover_the_split_once_and_never_cross_a_shard(sizes, pool):
    """Laid end to end, pieces are the split; each starts where a chunk starts, but for the split's ends."""
    pieces = cut_pieces(sizes, pool)
    windows = [window for piece in pieces for window in range(piece.start, piece.stop)]
    assert windows == list(range(sizes.first_window, sizes.first_window + sizes.windows))
    for piece in pieces:
        assert piece.start // sizes.shard_windows == (piece.stop - 1) // sizes.shard_windows == piece.shard
        assert (piece.start - piece.shard * sizes.shard_windows) % sizes.chunk_windows == 0 or piece is pieces[0]


@settings(deadline=None)
@given(sizes, st.integers(16, 400), st.integers(0, 3), st.integers(0, 3))
def test_every_epoch_draws_each_token_at_most_once(sizes, pool, seed, epoch):
    """The batches of an epoch hold no token twice, and leave out less than a batch a block."""
    plan = Plan(sizes, batch_tokens=16, pool_tokens=pool, seed=seed)
    drawn = []
    for block in plan.blocks(epoch):
        order = token_order(block, seed)
        assert sorted(order) == list(range(block.tokens))
        windows = [window for piece in block.pieces for window in range(piece.start, piece.stop)]
        tokens = [(w, t) for w in windows for t in range(sizes.trainable[w - sizes.first_window])]
        for at in range(block.steps):
            drawn += [tokens[place] for place in order[token_slice(block, at, 16)]]
    assert len(set(drawn)) == len(drawn)
    assert sizes.tokens - len(drawn) < 16 * plan.num_blocks


@settings(deadline=None)
@given(sizes, st.integers(16, 400), st.integers(0, 3))
def test_a_step_is_found_without_what_precedes_it(sizes, pool, seed):
    """Asking for one step of a fresh plan gives what walking there gives."""
    walked = Plan(sizes, batch_tokens=16, pool_tokens=pool, seed=seed)
    steps = walked.steps_in(3)
    expected = [(b, at) for epoch in range(3) for b in walked.blocks(epoch) for at in range(b.steps)]
    assert steps == len(expected)
    if walked.blocks(0):
        for step in {0, steps // 3, steps // 2, steps - 1}:
            assert Plan(sizes, batch_tokens=16, pool_tokens=pool, seed=seed).locate(step) == expected[step]


@settings(deadline=None)
@given(sizes, st.integers(16, 400), st.integers(0, 3))
def test_the_smallest_batch_of_windows_is_known_beforehand(sizes, pool, seed):
    plan = Plan(sizes, batch_tokens=16, pool_tokens=pool, seed=seed)
    if plan.blocks(0):
        for steps in {1, plan.steps_in(1), plan.steps_in(2)}:
            blocks = (plan.locate(step)[0] for step in range(steps))
            assert plan.least_windows(steps) == min(block.windows // block.steps for block in blocks)


def test_a_step_in_a_late_epoch_is_found():
    """Two thousand epochs on, without deep recursion."""
    plan = Plan(make_sizes(40), batch_tokens=16, pool_tokens=100, seed=0)
    block, at = plan.locate(plan.steps_in(2000) + 3)
    assert block.epoch == 2000
    assert block.first_step + at == plan.steps_in(2000) + 3


def test_an_epoch_without_a_whole_batch_is_passed_over():
    """Of three pieces two make a batch, where they come into one block."""

    def plan(seed):
        sizes = SplitSizes(0, 8, 1, 1, np.array([8, 8, 4]), 0.0, 0.0)
        return Plan(sizes, batch_tokens=16, pool_tokens=16, seed=seed)

    fresh = next(plan(seed) for seed in range(99) if plan(seed).blocks(0) and not plan(seed).blocks(1))
    block, at = fresh.locate(1)
    assert at == 0 and block.epoch > 1 and block == fresh.after(fresh.blocks(0)[0])


def test_the_block_after_the_last_is_the_next_epochs_first():
    plan = Plan(make_sizes(60), batch_tokens=16, pool_tokens=100, seed=0)
    assert plan.after(plan.blocks(0)[-1]) == plan.blocks(1)[0]


def test_epochs_and_seeds_differ():
    plan = Plan(make_sizes(60), batch_tokens=16, pool_tokens=100, seed=0)
    other = Plan(make_sizes(60), batch_tokens=16, pool_tokens=100, seed=1)
    assert [b.pieces for b in plan.blocks(0)] != [b.pieces for b in plan.blocks(1)]
    assert [b.pieces for b in plan.blocks(0)] != [b.pieces for b in other.blocks(0)]
    block = plan.blocks(0)[0]
    assert not np.array_equal(token_order(block, 0), token_order(block, 1))


def test_how_much_of_the_windows_is_taken_is_known():
    plan = Plan(make_sizes(60), batch_tokens=16, pool_tokens=200, seed=0)
    drawn = [window_slice(block, at) for block in plan.blocks(0) for at in range(block.steps)]
    total = sum(block.windows for block in plan.blocks(0))
    assert plan.windows_taken() == sum(part.stop - part.start for part in drawn) / total < 1


def test_windows_are_spread_over_the_same_steps():
    """Whole windows: each at most once, the same number in each batch, as many batches as for tokens."""
    plan = Plan(make_sizes(60), batch_tokens=16, pool_tokens=200, seed=0)
    for block in plan.blocks(0):
        order = window_order(block, 0)
        assert sorted(order) == list(range(block.windows))
        slices = [window_slice(block, at) for at in range(block.steps)]
        assert len({part.stop - part.start for part in slices}) == 1
        assert all(a.stop == b.start for a, b in pairwise(slices))
        assert slices[-1].stop <= block.windows < slices[-1].stop + block.steps


def test_a_block_has_pieces_from_all_over_the_split():
    plan = Plan(make_sizes(960, shard=12, chunk=1), batch_tokens=16, pool_tokens=2000, seed=0)
    for block in plan.blocks(0):
        assert len({piece.shard for piece in block.pieces}) > 20
        assert block.windows <= plan.max_windows


def test_ranks_share_a_batch():
    parts = [share(slice(10, 31), rank, 4) for rank in range(4)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(10, 31))


def test_a_pool_smaller_than_a_batch_is_refused():
    with pytest.raises(ConfigInvalid, match="pool_tokens 8 for batch_tokens 16"):
        Plan(make_sizes(9), batch_tokens=16, pool_tokens=8, seed=0)


def test_a_split_without_a_whole_batch_is_refused():
    with pytest.raises(ConfigInvalid, match="trainable tokens"):
        Plan(make_sizes(3), batch_tokens=500, pool_tokens=500, seed=0).locate(0)


def test_windows_larger_than_a_batch_are_refused():
    plan = Plan(make_sizes(30), batch_tokens=2, pool_tokens=100, seed=0)
    with pytest.raises(ConfigInvalid, match="at least one whole window"):
        window_slice(plan.blocks(0)[0], 0)
