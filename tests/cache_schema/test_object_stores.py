"""Stores on object stores: in memory, and behind a real S3 server on loopback."""

from __future__ import annotations

import importlib
import json
import threading
import time
import uuid
from bisect import bisect_right
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.asyn import sync_wrapper

from saemill.cache_schema import (
    AddressInvalid,
    AttentionSpec,
    ChunkMissing,
    Request,
    ShardCorrupt,
    Span,
    Store,
    StoreBusy,
    StoreMismatch,
    StoreMissing,
    StoreUnfinished,
    StoreUnreachable,
    StoreWriter,
    commits,
)
from saemill.cache_schema import disk_and_cloud_files as files_module
from saemill.cache_schema import shard_claims as claims_module
from saemill.cache_schema import writer as writer_module
from saemill.cache_schema.disk_and_cloud_files import Files, RemoteFiles, S3Files, open_files
from saemill.cache_schema.layout import INDEX, SUMMARY, device_name, record_key, record_name
from saemill.cache_schema.moments import merge
from saemill.cache_schema.reader import READERS, REMOTE_READERS
from saemill.cache_schema.shard_claims import LeaseClaims
from saemill.cache_schema.verify_and_repair import repair
from saemill.cache_schema.writer import compacts_after

from .conftest import Nursery, s3_at

s3fs = pytest.importorskip("s3fs")  # a machine without a network may lack it

EVERYTHING = Request(layers=(3, 5), attention_layers=(2, 3), tokens=True, documents=True)


@pytest.fixture(scope="module")
def bucket(s3_server):
    with s3_at(s3_server):
        yield "s3://mill"


@pytest.fixture(params=["memory", "s3"])
def url(request):
    name = uuid.uuid4().hex
    return f"memory://{name}" if request.param == "memory" else f"{request.getfixturevalue('bucket')}/{name}"


def test_the_same_store_as_on_a_disk(synthetic, tmp_path, url):
    manifest = synthetic.make_manifest()
    corpus = synthetic.write_store(url, manifest)
    synthetic.write_store(tmp_path, manifest, corpus)
    on_disk = synthetic.tree_of(tmp_path)
    del on_disk["commits/lock"]  # claims are objects there, and gone when they are released
    assert synthetic.objects_of(url) == on_disk


@pytest.mark.parametrize("via_zarr", [False, True], ids=["direct", "via_zarr"])
def test_streams_come_back(synthetic, url, via_zarr):
    manifest = synthetic.make_manifest()
    corpus = synthetic.write_store(url, manifest)
    with Store.open(url, via_zarr=via_zarr) as store:
        spans = []
        for arrays in store.stream(EVERYTHING, in_flight=3):
            start, stop = arrays.span.start, arrays.span.stop
            np.testing.assert_array_equal(arrays.resid[5], corpus.resid[5][start:stop])
            np.testing.assert_array_equal(arrays.attention[3].dense(), corpus.attention[3].slice(start, stop).dense())
            np.testing.assert_array_equal(arrays.documents, corpus.documents[start:stop])
            spans.append(arrays.span)
        assert spans == store.spans(EVERYTHING)
        assert store.moments(3).count == int((corpus.tokens != synthetic.SPECIAL).sum())


def test_two_writers_share_the_shards(synthetic, url):
    manifest = synthetic.make_manifest()
    corpus = synthetic.make_corpus(manifest)
    with (
        StoreWriter.create(url, manifest, corpus.tokens, corpus.documents) as one,
        StoreWriter.create(url, manifest, corpus.tokens, corpus.documents) as two,
    ):
        with one.claim(0) as first, two.claim(0) as second, two.claim(1) as other:
            assert (first, second, other) == (True, False, True)
        written = synthetic.write_pending(one, corpus, [0, 2, 4])
        assert two.pending() == [1, 3, 5]
        written += synthetic.write_pending(two, corpus, range(manifest.shards))
        assert one.pending() == []
        with one.claim(1) as is_to_do:
            assert not is_to_do
    assert sorted(written) == list(range(manifest.shards))
    with Store.open(url) as store:
        assert store.committed.all()


def test_processes_side_by_side_make_the_store_of_one(synthetic, bucket, tmp_path):
    """Real processes, so that nothing is shared but the server."""
    url = f"{bucket}/{uuid.uuid4().hex}"
    with closing(Nursery()) as nursery:
        writers = [nursery.ask(start=url, shards=4) for _ in range(2)]
        assert [nursery.ask(wait=pid) for pid in writers] == [0, 0]
        assert nursery.run(tmp_path, 4) == 0
    on_disk = synthetic.tree_of(tmp_path)
    del on_disk["commits/lock"]
    assert synthetic.objects_of(url) == on_disk
    with Store.open(url) as store:
        assert store.committed.all()


def test_faults_have_the_same_names(synthetic, url):
    manifest = synthetic.make_manifest()
    with pytest.raises(StoreMissing, match="no store at"):
        Store.open(url)
    corpus = synthetic.write_store(url, manifest, shards=[0, 1, 2])
    with Store.open(url) as store, pytest.raises(StoreUnfinished):
        store.spans(EVERYTHING)
    with pytest.raises(StoreMismatch, match="codec: the store has 'raw', but 'zstd' was asked for"):
        synthetic.write_store(url, synthetic.make_manifest(codec="zstd"), corpus)
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{path}/resid/layer_3/c.1.0.0", b"short")
    fs.rm_file(f"{path}/resid/layer_5/c.2.0.0")
    with Store.open(url) as store:
        with pytest.raises(ShardCorrupt, match="shard 1, array resid/layer_3"):
            store.read(Request(layers=(3,)), Span(1, 4, 8))
        with pytest.raises(ChunkMissing, match="shard 2, array resid/layer_5"):
            store.read(Request(layers=(5,)), Span(2, 8, 12))


def note_requests(patch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of S3 from now on."""
    calls, call = [], s3fs.S3FileSystem._call_s3

    async def noted(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        return await call(self, method, *args, **kwargs)

    patch.setattr(s3fs.S3FileSystem, "_call_s3", noted)
    patch.setattr(s3fs.S3FileSystem, "call_s3", sync_wrapper(noted))
    return calls


def test_opening_a_finished_store_reads_two_objects_and_lists_nothing(synthetic, bucket, monkeypatch):
    """And a request an object: s3fs would ask for its size first."""
    synthetic.write_store(f"{bucket}/finished", synthetic.make_manifest())
    fsspec.filesystem("s3").invalidate_cache()
    calls = note_requests(monkeypatch)
    with Store.open(f"{bucket}/finished") as store:
        assert calls == ["get_object"] * 2
        store.read(Request(layers=(3,)), Span(0, 0, 4))
    assert calls == ["get_object"] * 3


def test_the_simulator_asks_for_what_a_writer_asks_for(synthetic, bucket, monkeypatch):
    """bench/simulate.py, request by request."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    simulate = importlib.import_module("simulate")
    for module in (simulate, files_module):
        monkeypatch.setattr(module, "PAGE", 4)  # of six records
    manifest = synthetic.make_manifest(layers=(3,), attention=AttentionSpec())
    corpus = synthetic.make_corpus(manifest)
    StoreWriter.create(f"{bucket}/asked", manifest, corpus.tokens, corpus.documents).close()
    open_files(f"{bucket}/asked").remove("commits/index.json")
    with monkeypatch.context() as patch:
        calls = note_requests(patch)
        with StoreWriter.open(f"{bucket}/asked") as writer:
            assert len(synthetic.write_pending(writer, corpus)) == manifest.shards
    paper = simulate.Paper(chunks=2, has_device=False, deaths_a_day=0.0, shard_s=0.0)
    told = simulate.Harvest(manifest, 1, paper).run(again=False)
    assert told.lost == 0 and told.requests == Counter(call.split("_")[0].upper() for call in calls)


@pytest.mark.parametrize(("seconds", "looks"), [(0, 0), (30, 1)])
def test_beside_its_objects_a_shard_takes_a_claim_a_look_and_a_release(synthetic, monkeypatch, seconds, looks):
    """Each request more is one more for every shard of every worker; who computed for long looks at its claim again."""
    manifest, url, asked = synthetic.make_manifest(), f"memory://{uuid.uuid4().hex}", []
    corpus = synthetic.make_corpus(manifest)

    def count(files: RemoteFiles, name: str, call: Any, key: str, *rest: Any) -> Any:
        asked.append((name, key))
        return call(files, key, *rest)

    for name in ("create", "exists", "list", "read", "remove", "replace", "size", "which_exist"):
        monkeypatch.setattr(RemoteFiles, name, partialmethod(count, name, getattr(RemoteFiles, name)))
    with StoreWriter.create(url, manifest, corpus.tokens, corpus.documents) as writer:
        asked.clear()
        with writer.claim(1) as is_mine:
            later = time.time() + seconds
            monkeypatch.setattr(time, "time", lambda: later)
            assert is_mine and writer.write(1, synthetic.make_content(manifest, corpus, 1))
        found = [(name, key) for name, key in asked if name != "replace"]
    claim, record = "claims/1.json", record_key(1)
    assert found == [("create", claim), ("read", record), *[("read", claim)] * looks, ("remove", claim)]


class Listing:
    """A file system that lists as S3 does, and drops a slash at the end of a path as s3fs before 2026.2 does."""

    def __init__(self, names: list[str]) -> None:
        self.keys, self.req_kw, self.asked = sorted(f"store/commits/{name}" for name in names), {}, 0

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, key = path.rstrip("/").split("/", 1)
        return bucket, key, None

    def call_s3(self, method: str, **asked: Any) -> dict[str, Any]:
        self.asked += 1
        start = bisect_right(self.keys, asked["StartAfter"])
        page = self.keys[start : start + asked["MaxKeys"]]
        truncated = start + len(page) < len(self.keys)
        return {"Contents": [{"Key": key} for key in page], "IsTruncated": truncated}


@pytest.mark.parametrize("has_device", [False, True])
def test_of_a_listing_those_pages_are_read_that_could_have_what_lacks(has_device, monkeypatch):
    """Shards of which the index lacks all from some on, and a few before; names of six digits stand among shorter."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    simulate = importlib.import_module("simulate")
    shards, rng, pages = 100_400, np.random.default_rng(0), []
    harvest = simulate.Harvest(simulate.make_manifest(shards), 1, simulate.Paper(has_device=has_device))
    harvest.files.objects["commits/index.json"] = b""
    for lacking in (0, 1, 3, 50, 2000):
        index, committed = np.arange(shards) < 100_000 - lacking, rng.random(shards) < 0.99
        index[rng.integers(shards, size=lacking)] = False
        committed |= index
        harvest.files.committed = committed
        found = commits.Index("", committed=commits._ranges(index))
        names = [record_name(shard) for shard in np.flatnonzero(committed)]
        notes = [device_name(shard) for shard in np.flatnonzero(committed)] if has_device else []
        listing = Listing([*names, *notes, "index.json"])
        lacks = [record_name(shard) for shard in np.flatnonzero(~index)]
        have = set(names)
        assert S3Files(listing, "mill/store", "").which_exist("commits", lacks) == [n for n in lacks if n in have]
        assert listing.asked == harvest._pages(found)
        pages.append(listing.asked)
    assert pages[0] <= 4 and pages == sorted(pages) and pages[-1] <= len(listing.keys) // 1000 + 1


def test_a_server_that_lists_in_no_order_is_listed_whole(monkeypatch):
    names, listing = [f"{number}.json" for number in range(9)], Listing([])
    page = [{"Key": f"store/commits/{name}"} for name in reversed(names)]
    monkeypatch.setattr(listing, "call_s3", lambda *_, **__: {"Contents": page, "IsTruncated": True})
    monkeypatch.setattr(RemoteFiles, "list", lambda *_: names)
    files = S3Files(listing, "mill/store", "")  # type: ignore[arg-type]
    assert files.which_exist("commits", ["7.json", "9.json", "0.json"]) == ["7.json", "0.json"]


def test_a_harvest_on_paper_loses_nothing(monkeypatch):
    """Of 40 workers that die twice an hour each, some hold a shard when all have ended: one command more takes it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    simulate = importlib.import_module("simulate")
    manifest = simulate.make_manifest(400)
    told = simulate.Harvest(manifest, 40, simulate.Paper(deaths_a_day=48.0)).run()
    assert told.deaths > 5 and told.lost == 0
    assert told.requests["PUT"] > 13 * 400 and told.hours < 2


def test_simulated_workers_that_end_together_wait_for_one_summary(monkeypatch):
    """Its reading takes its time on their clock too, here nearly four minutes: no one knows of it before."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    simulate = importlib.import_module("simulate")
    manifest = replace(simulate.make_manifest(64), layers=tuple(range(26)))
    paper = simulate.Paper(request_s=2.0, shard_s=1.0, deaths_a_day=0.0)
    told = simulate.Harvest(manifest, 64, paper).run(again=False)
    lines = 64 * 26
    assert told.lost == 0 and lines < told.requests["GET"] < 4 * lines and told.requests["HEAD"] > 5 * 64
    assert told.hours * 3600 > lines * 2.0 / commits.READ_AT_ONCE


def test_a_dead_writers_claim_lapses(synthetic, url, monkeypatch):
    manifest = synthetic.make_manifest()
    corpus = synthetic.make_corpus(manifest)
    with StoreWriter.create(url, manifest, corpus.tokens, corpus.documents) as writer:
        files = open_files(url)
        assert isinstance(files, RemoteFiles)
        dead = LeaseClaims(files)
        assert dead.take(0)
        dead.close()  # nobody renews it any more
        with writer.claim(0) as is_mine:
            assert not is_mine
        later = time.time() + 11 * 60
        monkeypatch.setattr(time, "time", lambda: later)
        with writer.claim(0) as is_mine:
            assert is_mine


def test_an_object_store_has_as_many_chunks_in_flight_from_a_writer_as_to_a_reader(synthetic, tmp_path):
    for url, expected in [(f"memory://{uuid.uuid4().hex}", REMOTE_READERS), (str(tmp_path / "store"), READERS)]:
        synthetic.write_store(url, synthetic.make_manifest())
        with StoreWriter.open(url) as writer, Store.open(url) as store:
            assert writer._pool._max_workers == store._executor()._max_workers == expected


@pytest.fixture
def creates_in_one_step(monkeypatch):
    """As an object store does; fsspec's memory looks whether a key is there, and then writes it."""
    turn, create = threading.Lock(), RemoteFiles.create

    def in_turn(*args):
        with turn:
            return create(*args)

    monkeypatch.setattr(RemoteFiles, "create", in_turn)


@pytest.mark.usefixtures("creates_in_one_step")
def test_of_writers_that_end_together_one_reads_the_records(synthetic, monkeypatch):
    """Each would read all of them: thousands of workers, millions of requests."""
    manifest, url = synthetic.make_manifest(), f"memory://{uuid.uuid4().hex}"
    corpus = synthetic.make_corpus(manifest)
    writers = [StoreWriter.create(url, manifest, corpus.tokens, corpus.documents) for _ in range(3)]
    for shard in range(manifest.shards):
        synthetic.write_pending(writers[shard % 3], corpus, [shard])
    read, keys = RemoteFiles.read, []
    monkeypatch.setattr(RemoteFiles, "read", lambda files, key: (keys.append(key), read(files, key))[1])
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(StoreWriter.close, writers))
    records = [record_key(shard) for shard in range(manifest.shards)]
    assert sorted(key for key in keys if key in records) == records


@pytest.mark.parametrize("derives", [False, True])
def test_lines_of_moments_are_read_many_at_once_however_late_the_first_answers(synthetic, monkeypatch, derives):
    """Of all shards and, for a summary, of all places: the first answers when the last has been asked for."""
    url, last = f"memory://{uuid.uuid4().hex}", (5, 5) if derives else (3, 5)
    synthetic.write_store(url, synthetic.make_manifest())
    open_files(url).remove(SUMMARY)
    is_asked, read = threading.Event(), Store.shard_moments

    def late(store, layer, shard, hook="resid"):
        if (layer, shard) == last:
            is_asked.set()
        assert (layer, shard) != (3, 0) or is_asked.wait(60)
        return read(store, layer, shard, hook)

    with Store.open(url) as store:
        expected = merge(store.shard_moments(3, shard) for shard in range(6))
        monkeypatch.setattr(Store, "shard_moments", late)
        index = commits.read_index(store.files, store.manifest)
        found = writer_module.derive_summary(store.files, store.manifest, index) if derives else store
        np.testing.assert_array_equal(found.moments(3).mean, expected.mean)


def test_of_what_is_left_a_few_are_tried_in_no_order():
    """All where they are few: a claim whose writer died is seen by trying it. In one order all would meet at one."""
    files = open_files(f"memory://{uuid.uuid4().hex}")
    one, other = make_claims(files), make_claims(files)
    assert all(one.take(number) for number in range(10))
    assert sorted(other.worth_trying(list(range(20)))) == list(range(20))
    assert all(one.take(number) for number in range(10, 40))
    found = other.worth_trying(list(range(400)))
    free = [number for number in found if number >= 40]
    assert len(set(free)) == claims_module.FREE_TRIED and free != sorted(free)
    assert len(set(found)) == len(found) == claims_module.FREE_TRIED + claims_module.HELD_TRIED
    one.close()


@pytest.mark.usefixtures("creates_in_one_step")
def test_of_writers_that_end_together_one_derives_the_summary_while_the_others_wait(synthetic, monkeypatch):
    """However long it takes: each would read a line of every shard and place."""
    manifest, url = synthetic.make_manifest(), f"memory://{uuid.uuid4().hex}"
    corpus, derive, calls = synthetic.make_corpus(manifest), writer_module.derive_summary, []
    writers = [StoreWriter.create(url, manifest, corpus.tokens, corpus.documents) for _ in range(3)]
    synthetic.write_pending(writers[0], corpus)
    monkeypatch.setattr(claims_module, "DERIVED_SECONDS", 0.05)

    def slow(*args):
        calls.append(args)
        time.sleep(0.5)
        return derive(*args)

    def close(writer):
        writer.close()
        return writer.files.exists(SUMMARY)

    monkeypatch.setattr(writer_module, "derive_summary", slow)
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(close, writers))
    assert len(calls) == 1


def test_a_writer_that_died_deriving_holds_others_up_and_no_more(synthetic, monkeypatch):
    """Of a store that is not finished for a minute, at the end until its claim lapses: then another does its work."""
    manifest, url = synthetic.make_manifest(), f"memory://{uuid.uuid4().hex}"
    dead = make_claims(open_files(url))
    assert claims_module.DERIVED_SECONDS <= 60
    monkeypatch.setattr(claims_module, "DERIVED_SECONDS", 0.1)
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(claims_module, "LEASE_SECONDS", 1.0)
        patch.setattr(time, "time", lambda: now)  # it has not lapsed yet, however slow the machine is
        assert dead.take(claims_module.DERIVED)
        corpus = synthetic.write_store(url, manifest, shards=range(5))
        assert not make_claims(open_files(url)).take(claims_module.DERIVED)
    with StoreWriter.open(url) as writer:
        synthetic.write_pending(writer, corpus)
    with Store.open(url) as store:
        assert store.committed.all() and store.files.exists(SUMMARY)
    dead.close()


def test_repair_takes_nothing_away_beside_another_that_derives_the_index(synthetic, monkeypatch):
    """It read the index of before, and would write it back: with shards that are gone."""
    url = f"memory://{uuid.uuid4().hex}"
    synthetic.write_store(url, synthetic.make_manifest())
    slow = make_claims(open_files(url))
    assert slow.take(claims_module.DERIVED)
    monkeypatch.setattr(claims_module, "DERIVED_SECONDS", 0.1)
    with pytest.raises(
        StoreBusy, match=r"up to date. Wait for it, then try again\. If that writer was killed, run again"
    ):
        repair(url, [1])
    with pytest.raises(StoreBusy):  # it could not make it again
        repair(url, [], [SUMMARY])
    with Store.open(url) as store:
        assert store.committed.all() and store.record(1) and store.files.exists(SUMMARY)
    slow.release(claims_module.DERIVED)
    repair(url, [1])
    with Store.open(url) as store:
        assert np.flatnonzero(~store.committed).tolist() == [1]
    slow.close()


def test_repair_without_the_claim_looks_for_all_records_itself(synthetic, monkeypatch):
    """The index that it finds may be that of a writer which gave up waiting, with shards that are gone."""
    url = f"memory://{uuid.uuid4().hex}"
    synthetic.write_store(url, synthetic.make_manifest())
    files = open_files(url)
    slow = make_claims(files)
    assert slow.take(claims_module.DERIVED)
    monkeypatch.setattr(claims_module, "DERIVED_SECONDS", 0.1)
    files.remove(record_key(1))
    repair(url, [])
    with Store.open(url) as store:
        assert np.flatnonzero(~store.committed).tolist() == [1]
    slow.close()


@pytest.mark.parametrize("writes_last", ["writer", "repair"])
def test_a_writer_that_gave_up_waiting_for_the_index_brings_no_shard_back(synthetic, monkeypatch, writes_last):
    """Whichever of it and repair writes the index last: what repair took away is not in it."""
    manifest, url = synthetic.make_manifest(), f"memory://{uuid.uuid4().hex}"
    corpus = synthetic.write_store(url, manifest, shards=range(4))
    files, late = open_files(url), StoreWriter.open(url)
    manifest = late.manifest  # with its id
    synthetic.write_pending(late, corpus, [4])
    repairing = make_claims(files)
    assert repairing.take(claims_module.DERIVED)
    monkeypatch.setattr(claims_module, "DERIVED_SECONDS", 0.1)
    first, second = late.close, lambda: commits.forget(files, manifest, [1])
    if writes_last == "repair":
        first, second = second, first
    between, replace = [second], RemoteFiles.replace

    def interrupted(self: RemoteFiles, key: str, data: bytes) -> None:
        other = between.pop() if key == INDEX and between else lambda: None
        if writes_last != "repair":
            other()
            replace(self, key, data)
        else:  # of repair the record is what goes last
            replace(self, key, data)
            other()

    monkeypatch.setattr(RemoteFiles, "replace", interrupted)
    first()
    assert not between
    with Store.open(url) as store:
        assert np.flatnonzero(~store.committed).tolist() == [1, 5]
        assert commits.read_index(files, manifest) == commits.derive_index(files, manifest, store.committed)
    repairing.close()


@pytest.mark.parametrize("is_alone", [False, True])
def test_a_record_that_goes_after_it_was_listed_is_looked_for_again(synthetic, monkeypatch, is_alone):
    """Somebody takes shards away beside who has no claim; who has it is told of damage."""
    url = f"memory://{uuid.uuid4().hex}"
    synthetic.write_store(url, synthetic.make_manifest(), shards=range(5))
    files, manifest, find = open_files(url), Store.open(url).manifest, commits.find_committed
    files.remove(INDEX)

    def listed(*args):
        found = find(*args)
        files.remove(record_key(1))
        return found

    monkeypatch.setattr(commits, "find_committed", listed)
    if is_alone:
        with pytest.raises(StoreUnfinished, match="shard 1"):
            commits.compact(files, manifest)
    else:
        assert commits.compact(files, manifest, holds_claim=False).committed == ((0, 1), (2, 5))


@pytest.mark.parametrize("shards", [1000, 10**5])
@pytest.mark.parametrize("workers", [1, 7, 64, 100, 1000])
def test_the_work_on_the_index_is_dealt_out(shards, workers):
    """However many share a store, and whichever shards they take, of 64 or of a thousandth part one brings it about."""
    due = np.array([compacts_after(shard, shards) for shard in range(shards)])
    every = max(64, shards // 1000)
    assert due.sum() == pytest.approx(shards / every, rel=0.1)
    each = [due[worker::workers].sum() for worker in range(workers)]
    assert max(each) <= 2 * shards / every / workers + 2


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on only when a test moves it. Claims are renewed all the time."""
    clock = SimpleNamespace(now=time.time())
    monkeypatch.setattr(time, "time", lambda: clock.now)
    assert claims_module.RENEW_SECONDS <= claims_module.LEASE_SECONDS / 4  # a network may fail at some of them
    monkeypatch.setattr(claims_module, "RENEW_SECONDS", 0.001)
    return clock


def move(clock: SimpleNamespace, seconds: float, files: Files, number: int) -> None:
    """In two steps, in each of which this claim is renewed: between them all that its writer has are."""
    for _ in range(2):
        clock.now += seconds / 2
        last = time.monotonic() + 30
        while json.loads(files.read(f"claims/{number}.json"))["until"] < clock.now + claims_module.LEASE_SECONDS:
            assert time.monotonic() < last, "the claim was not renewed"
            time.sleep(0.001)


def make_claims(files: Files) -> LeaseClaims:
    assert isinstance(files, RemoteFiles)
    return LeaseClaims(files)


def test_a_living_writer_keeps_its_claim_beyond_the_lease(clock):
    files = open_files(f"memory://{uuid.uuid4().hex}")
    living, other = make_claims(files), make_claims(files)
    assert living.take(0)
    move(clock, 1.5 * claims_module.LEASE_SECONDS, files, 0)
    assert not other.take(0)
    living.close()
    clock.now += 1.1 * claims_module.LEASE_SECONDS
    assert other.take(0)
    other.close()


def test_a_released_claim_is_not_brought_back(clock):
    files = open_files(f"memory://{uuid.uuid4().hex}")
    claims = make_claims(files)
    assert claims.take(0) and claims.take(1)
    claims.release(0)
    move(clock, 1, files, 1)
    assert files.list("claims") == ["1.json"]
    claims.close()


def test_a_claim_that_another_took_over_is_left_to_it(clock):
    files = open_files(f"memory://{uuid.uuid4().hex}")
    slept, other = make_claims(files), make_claims(files)
    assert slept.take(0) and slept.take(1)
    with slept._lock:  # it renews nothing meanwhile
        files.remove("claims/0.json")
        assert other.take(0)
    other.close()  # so that only the first one could still change it
    lease = files.read("claims/0.json")
    move(clock, 1, files, 1)
    assert files.read("claims/0.json") == lease
    slept.close()


def test_a_renewal_that_fails_is_tried_again(clock, monkeypatch):
    files = open_files(f"memory://{uuid.uuid4().hex}")
    living, other = make_claims(files), make_claims(files)
    replace, failures = RemoteFiles.replace, [TimeoutError("slow"), RuntimeError("odd")]

    def failing(*args: Any) -> None:
        if failures:
            raise failures.pop()
        replace(*args)

    monkeypatch.setattr(RemoteFiles, "replace", failing)
    assert living.take(0)
    move(clock, 1.5 * claims_module.LEASE_SECONDS, files, 0)
    assert not failures and not other.take(0)
    living.close()


def test_a_store_that_is_being_created_says_when_to_come_back(synthetic, url):
    claims = make_claims(open_files(url))
    assert claims.take(claims_module.CREATION)
    with pytest.raises(StoreBusy, match=r"creating .* If that writer was killed, run again in 10 minutes"):
        synthetic.write_store(url, synthetic.make_manifest())
    claims.close()


def test_who_takes_a_lapsed_claim_looks_whether_it_kept_it(monkeypatch):
    """Another saw it lapse too, and removed what the first had just made in its place."""
    files = open_files(f"memory://{uuid.uuid4().hex}")
    assert isinstance(files, RemoteFiles)
    dead, first, second = (LeaseClaims(files) for _ in range(3))
    assert dead.take(0)
    dead.close()
    monkeypatch.setattr(LeaseClaims, "_has_lapsed", lambda claims, number: True)
    assert first.take(0) and second.take(0)
    assert second.keeps(0) and not first.keeps(0)
    first.close()
    second.close()


def test_storage_that_overwrites_what_exists_is_refused(synthetic, url, monkeypatch):
    """Servers without conditional writes, and libraries that do not know them, as s3fs with aiobotocore before 2.14."""
    fs, pipe_file = open_files(url).fs, open_files(url).fs.pipe_file
    monkeypatch.setattr(fs, "pipe_file", lambda path, data, mode="overwrite": pipe_file(path, data))
    with pytest.raises(AddressInvalid, match="refuses to create an object that exists.*Update the library"):
        synthetic.write_store(url, synthetic.make_manifest())
    assert synthetic.objects_of(url) == {}


def test_a_claim_that_was_removed_at_once_does_not_speak_against_the_storage(monkeypatch):
    """By another that saw the one before it lapse."""
    files, create, calls = open_files(f"memory://{uuid.uuid4().hex}"), RemoteFiles.create, []

    def create_then_lose(files: RemoteFiles, key: str, data: bytes) -> bool:
        calls.append(create(files, key, data))
        if len(calls) == 1:
            files.remove(key)
        return calls[-1]

    monkeypatch.setattr(RemoteFiles, "create", create_then_lose)
    claims = make_claims(files)
    assert claims.take(0) and claims.take(1)
    assert calls == [True, True, False, True]
    claims.close()


@pytest.mark.parametrize("lease", [b"", b"[]", b"{", b'{"until": "tomorrow"}', b"\xff"])
def test_a_claim_that_nobody_can_read_has_lapsed(lease):
    """It can only be half of something: holding a shard for ever because of it would help nobody."""
    files = open_files(f"memory://{uuid.uuid4().hex}")
    assert isinstance(files, RemoteFiles)
    claims = LeaseClaims(files)
    assert claims.take(3)
    assert not claims.take(3)
    files.write("claims/3.json", [np.frombuffer(lease, np.uint8)])
    assert claims.take(3)
    claims.close()


def test_an_error_without_a_number_is_not_printed_as_none(monkeypatch):
    """What a network's library raises is often no OSError."""
    files = open_files(f"memory://{uuid.uuid4().hex}")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no\nroute")

    monkeypatch.setattr(files.fs, "cat_file", fail)
    with pytest.raises(StoreUnreachable, match=r"^RuntimeError while reading zarr.json .* \(no route\)"):
        files.read("zarr.json")
