"""Batches for anyone's trainer: the tokens that our own runs draw, in an order that is found again."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from saemill.cache_schema import RequestInvalid, Store, to_float32
from saemill.train.data.batch import Needs
from saemill.train.data.batch_stream import Feed
from saemill.train.data.batches_for_others import Batches
from saemill.train.data.scaling import stats_from_moments
from saemill.train.data.shuffle_order import Plan, measure_split
from saemill.train.errors import ConfigInvalid, StateInvalid
from saemill.train.run.preflight import layer_stats

CPU = torch.device("cpu")


@pytest.fixture
def store(written):
    with Store(written["path"]) as store:
        yield store


@pytest.fixture
def open_batches(store):
    """open_batches(layers, batch_tokens=..., pool_tokens=..., seed=..., ...); closed when the test ends."""
    opened = []

    def make(layers=3, *, batch_tokens=40, pool_tokens=480, seed: int | None = 0, massive_norms=None, **settings):
        split = settings.setdefault("split", "train")
        plan = Plan(measure_split(store, split), batch_tokens=batch_tokens, pool_tokens=pool_tokens, seed=seed)
        stats = {layer: layer_stats(store, layer, massive_norms) for layer in (3, 4)}
        opened.append(Batches(store, plan, layers, stats, CPU, **settings))
        return opened[-1]

    yield make
    for batches in opened:
        batches.close()


@pytest.mark.parametrize("scaled", [False, True])
def test_they_are_what_a_run_draws_step_by_step(store, open_batches, scaled):
    batches = open_batches(scaled=scaled, epochs=2)
    needs, stats = Needs((3,)), {3: stats_from_moments(store.moments(3))}
    feed = Feed(store, batches._plan, [needs], stats, CPU)
    count = 0
    for step, x in enumerate(batches):
        expected = feed.draw(step).batch(needs).x
        torch.testing.assert_close(x, expected if scaled else expected / stats[3].scale)
        count += 1
    feed.close()
    assert count == len(batches) == batches._plan.steps_in(2)


def test_in_the_order_of_the_store_where_nothing_is_shuffled(written, open_batches):
    """One block: only the tokens after the last whole batch are missing."""
    x = torch.cat(list(open_batches(seed=None, pool_tokens=10_000)))
    train = written["tokens"][:220] != 2
    expected = to_float32(written["resid"][3][:220][train], "bfloat16")
    assert torch.equal(x, torch.from_numpy(expected[: len(x)])) and len(expected) - len(x) < 40
    blocks = torch.cat(list(open_batches(seed=None)))  # many blocks: each leaves out its own end
    rows = {tuple(row): at for at, row in enumerate(expected.tolist())}
    assert np.all(np.diff([rows[tuple(row)] for row in blocks.tolist()]) > 0)


def test_rows_of_massive_norm_are_left_out_as_in_a_run(store, open_batches):
    """At a multiple that leaves out a good part of them."""
    bound = layer_stats(store, 3, 1.05).massive.bound
    every, fewer = (list(open_batches(massive_norms=multiple)) for multiple in (None, 1.05))
    assert max(x.norm(dim=1).max() for x in fewer) <= bound < max(x.norm(dim=1).max() for x in every)
    assert len(fewer) == len(every) and 0 < sum(map(len, fewer)) < sum(map(len, every))


def test_several_layers_stand_beside_each_other(open_batches):
    both, three, four = (open_batches(layers) for layers in ((3, 4), 3, 4))
    for x, a, b in zip(both, three, four, strict=True):
        assert x.shape == (40, 2, 16) and torch.equal(x[:, 0], a) and torch.equal(x[:, 1], b)


def test_each_pass_has_an_order_of_its_own(open_batches):
    batches = open_batches(pool_tokens=10_000)
    first, second = ({tuple(row) for x in batches for row in x.tolist()} for _ in range(2))
    assert len(first) == len(second) and len(first & second) > 0.9 * len(first)
    again = open_batches(pool_tokens=10_000)
    assert torch.equal(next(again), next(iter(open_batches(pool_tokens=10_000))))
    assert not torch.equal(next(again), next(iter(open_batches(pool_tokens=10_000, seed=1))))


@pytest.mark.parametrize("epochs", [1, 2, None])
@pytest.mark.parametrize("done", [0, 3, 36, 37, 40])
def test_a_state_goes_on_with_the_same_batches(open_batches, epochs, done):
    """Also where a pass ends: an epoch has 37 batches here, and at its end `for` begins the next pass."""

    def endless(batches):
        while True:
            yield from batches

    whole = endless(open_batches(epochs=epochs))
    assert epochs is None or len(open_batches(epochs=1)) == 37
    source = open_batches(epochs=epochs)
    taken = endless(source)
    for _ in range(done):
        assert torch.equal(next(taken), next(whole))
    state = json.loads(json.dumps(source.state_dict()))
    resumed = open_batches(epochs=epochs)
    resumed.load_state_dict(state)
    rest = endless(resumed)
    for _ in range(45):
        assert torch.equal(next(rest), next(whole))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed 0 (here 1)"),
        ({"batch_tokens": 20}, "batch_tokens 40 (here 20)"),
        ({"pool_tokens": 900}, "pool_tokens 480 (here 900)"),
        ({"layers": 4}, "layers [3] (here [4])"),
        ({"massive_norms": 10.0}, "largest_norms {} (here {'3': "),
        ({"split": "test", "pool_tokens": 480}, "split 'train' (here 'test')"),
    ],
)
def test_a_state_of_other_batches_is_refused(open_batches, change, said):
    state = open_batches().state_dict()
    with pytest.raises(StateInvalid, match="these same batches") as refused:
        open_batches(**change).load_state_dict(state)
    assert said in str(refused.value)


def test_a_state_of_the_same_text_in_other_shards_is_refused(open_batches):
    """The id of a store says nothing of its shards, and the order goes by them."""
    batches = open_batches()
    with pytest.raises(StateInvalid, match="shard_windows 7"):
        batches.load_state_dict({**batches.state_dict(), "shard_windows": 7})


def test_a_state_without_its_step_is_refused(open_batches):
    state = open_batches().state_dict()
    for step in (None, -1, "3"):
        with pytest.raises(StateInvalid, match="step"):
            open_batches().load_state_dict({**state, "step": step})


def test_they_are_a_data_set_of_torch(open_batches):
    batches = open_batches()
    assert isinstance(batches, IterableDataset)
    own = {"batch_size": None, "generator": torch.Generator()}  # or torch takes numbers of the global one
    through = list(DataLoader(batches, **own))
    assert len(through) == len(batches) and torch.equal(through[5], list(open_batches())[5])
    with pytest.raises(ConfigInvalid, match="num_workers=0"):
        next(iter(DataLoader(open_batches(), num_workers=1, **own)))


def test_processes_share_every_batch(open_batches):
    whole = list(open_batches())
    parts = [list(open_batches(rank=rank, size=3)) for rank in range(3)]
    assert all(torch.equal(x, torch.cat(shares)) for x, *shares in zip(whole, *parts, strict=True))


def test_without_end_they_have_no_length_and_do_not_stop(open_batches):
    batches = open_batches(epochs=None)
    with pytest.raises(TypeError, match="no length"):
        len(batches)
    for _ in range(100):
        next(batches)


def test_memory_and_threads_are_given_back_at_the_end_of_a_pass(open_batches):
    batches = open_batches()
    next(batches)
    assert batches._feed is not None
    for _ in batches:
        pass
    assert batches._feed is None
    with pytest.raises(StopIteration):
        next(batches)


def test_reading_ahead_ends_with_the_batches(store, monkeypatch):
    close, closed = Feed.close, []
    monkeypatch.setattr(Feed, "close", lambda feed: closed.append(close(feed)))
    plan = Plan(measure_split(store, "train"), batch_tokens=40, pool_tokens=480, seed=0)
    batches = Batches(store, plan, 3, {3: layer_stats(store, 3, None)}, CPU, split="train")
    next(batches)
    assert not closed
    del batches
    gc.collect()
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"layers": 9}, RequestInvalid, "residuals of layer 9"),
        ({"layers": ()}, ConfigInvalid, "at least one layer"),
        ({"epochs": 0}, ConfigInvalid, "expected 1 or more"),
        ({"rank": 2, "size": 2}, ConfigInvalid, "rank: expected"),
        ({"batch_tokens": 10**6, "pool_tokens": 10**6}, ConfigInvalid, "at least one whole batch"),
    ],
)
def test_what_cannot_be_is_refused_when_they_are_opened(open_batches, settings, error, said):
    with pytest.raises(error, match=said):
        open_batches(**settings)
