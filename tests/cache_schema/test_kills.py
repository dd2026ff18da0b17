"""Writers killed at any instant: committed shards stay whole, and a resumed store is byte-identical.

The kills are SIGKILL to real processes. Two ways to choose the instant: before the n-th call into the
file system, for n after n, which leaves no instant out; and at a random time, with several writers at
work on one store, which leaves no interleaving out.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from saemill.cache_schema import Request, Site, Span, Store, StoreMissing

from .conftest import Nursery

KILLED = signal.SIGKILL.value


@pytest.fixture(scope="module")
def nursery():
    with closing(Nursery()) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def corpora(synthetic):
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import crash_nursery
    finally:
        sys.path.pop(0)
    return {shards: (crash_nursery.crash_manifest(shards), crash_nursery.crash_corpus(shards)) for shards in (2, 12)}


def require_whole_shards(synthetic, folder: Path, manifest, corpus) -> int:
    """Every committed shard reads back right; return how many there are."""
    try:
        store = Store.open(folder)
    except StoreMissing:  # killed before the root was written: there is no store yet
        return 0
    everything = Request(layers=(3,), attention_layers=(2,), tokens=True, documents=True)
    with store:
        committed = np.flatnonzero(store.committed).tolist()
        order = [Span(shard, *manifest.shard_range(shard)) for shard in committed]
        for arrays in store.stream(everything, order):
            expected = synthetic.make_content(manifest, corpus, arrays.span.shard)
            np.testing.assert_array_equal(arrays.resid[3], expected.acts[Site("resid", 3)])
            np.testing.assert_array_equal(arrays.attention[2].dense(), expected.attention[2].dense())
            np.testing.assert_array_equal(arrays.tokens, expected.tokens)
            np.testing.assert_array_equal(arrays.documents, expected.documents)
    return len(committed)


def kill_at_calls(nursery, synthetic, corpora, folder: Path, instants) -> int:
    """For each instant: kill there, look, resume, compare. Returns how many writers died."""
    manifest, corpus = corpora[2]
    assert nursery.run(folder / "straight", 2) == 0
    expected = synthetic.tree_of(folder / "straight")
    for died, call in enumerate(instants):
        place = folder / f"killed_at_{call}"
        status = nursery.run(place, 2, die_at=call)
        require_whole_shards(synthetic, place, manifest, corpus)
        assert nursery.run(place, 2) == 0
        assert synthetic.tree_of(place) == expected, f"killed before call {call}"
        if status == 0:
            return died
        assert status == KILLED
    return len(instants)


def test_killed_before_calls_all_over_a_run(nursery, synthetic, corpora, tmp_path):
    rng = random.Random(0)
    instants = sorted(rng.sample(range(1, 350), 16))
    assert kill_at_calls(nursery, synthetic, corpora, tmp_path, instants) >= 12


@pytest.mark.slow
@pytest.mark.faults
def test_killed_before_every_single_call(nursery, synthetic, corpora, tmp_path, tell):
    died = kill_at_calls(nursery, synthetic, corpora, tmp_path, range(1, 10_000))
    assert 200 < died < 2_000
    tell(f"{died:,} writers, one for each call into the file system", {"SIGKILL": died})


def kill_at_random_times(nursery, synthetic, corpora, folder: Path, kills: int, seed: int) -> tuple[int, int]:
    """Up to three writers on one store, killed together, store after store until enough have died; stores and dead."""
    rng = random.Random(seed)
    manifest, corpus = corpora[12]
    assert nursery.run(folder / "straight", 12) == 0
    expected = synthetic.tree_of(folder / "straight")
    died = campaign = 0
    while died < kills:
        place = folder / f"campaign_{campaign}"
        campaign += 1
        shards, patience = -1, 0.15
        while (now := require_whole_shards(synthetic, place, manifest, corpus)) < manifest.shards:
            patience *= 1.0 if now > shards else 1.1  # until a slow machine gets something done
            shards = now
            writers = [nursery.ask(start=str(place), shards=12) for _ in range(rng.randint(1, 3))]
            time.sleep(rng.random() * patience)
            for pid in writers:
                os.kill(pid, signal.SIGKILL)
            died += sum(nursery.ask(wait=pid) == KILLED for pid in writers)
        assert nursery.run(place, 12) == 0
        assert synthetic.tree_of(place) == expected
    return campaign, died


def test_several_writers_killed_at_random_times(nursery, synthetic, corpora, memory_folder):
    kill_at_random_times(nursery, synthetic, corpora, memory_folder, kills=60, seed=0)


@pytest.mark.slow
@pytest.mark.faults
def test_several_writers_killed_at_random_times_for_long(nursery, synthetic, corpora, tmp_path, tell):
    stores, died = kill_at_random_times(nursery, synthetic, corpora, tmp_path, kills=1000, seed=1)
    tell(f"{stores:,} stores by up to three writers", {"SIGKILL": died})


def test_writers_side_by_side_make_the_store_of_one(nursery, synthetic, corpora, tmp_path):
    """No kill: three processes share the shards, and leave what one leaves."""
    assert nursery.run(tmp_path / "straight", 12) == 0
    writers = [nursery.ask(start=str(tmp_path / "shared"), shards=12) for _ in range(3)]
    assert [nursery.ask(wait=pid) for pid in writers] == [0, 0, 0]
    manifest, corpus = corpora[12]
    assert require_whole_shards(synthetic, tmp_path / "shared", manifest, corpus) == manifest.shards
    assert synthetic.tree_of(tmp_path / "shared") == synthetic.tree_of(tmp_path / "straight")
