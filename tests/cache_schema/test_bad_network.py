"""A store behind an S3 server that loses requests and answers, throttles, delays, and ends in the middle.

Writers work on it side by side and run again when they are told to, as a person would. Nothing that was
committed is lost, nothing half-written is read, the bytes are those of a store on a quiet disk, and every
error has its name and says what to do.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saemill.cache_schema import (
    Request,
    Span,
    Store,
    StoreBusy,
    StoreError,
    StoreMismatch,
    StoreUnreachable,
    StoreWriter,
)
from saemill.cache_schema import disk_and_cloud_files as files_module
from saemill.cache_schema import shard_claims as claims_module
from saemill.cache_schema import writer as writer_module
from saemill.cache_schema.disk_and_cloud_files import LocalFiles, RemoteFiles, open_files
from saemill.cache_schema.layout import arrays_of
from saemill.cache_schema.shard_claims import LeaseClaims

from .conftest import forget_instances, s3_at
from .faulty_proxy import FaultyProxy

s3fs = pytest.importorskip("s3fs")
botocore = pytest.importorskip("botocore")

EVERYTHING = Request(layers=(3,), attention_layers=(2,), tokens=True, documents=True)


@pytest.fixture(scope="module")
def proxy(s3_server: str) -> Iterator[Any]:
    """s3fs tries again quickly here, and not for long."""
    proxy = FaultyProxy(s3_server)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "retries", 2)
        with s3_at(proxy.url, AWS_MAX_ATTEMPTS="1"):
            yield proxy
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture
def short_leases(monkeypatch):
    monkeypatch.setattr(claims_module, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(claims_module, "RENEW_SECONDS", 0.1)


@pytest.fixture
def material(synthetic, tmp_path) -> Any:
    """Manifest, corpus, and the bytes of a store on a quiet disk."""
    manifest = synthetic.make_manifest(windows=7, context=4, width=3, shard_windows=2, layers=(3,))
    manifest = synthetic.replace(manifest, attention=synthetic.replace(manifest.attention, layers=(2,)))
    corpus = synthetic.write_store(tmp_path / "quiet", manifest)
    expected = synthetic.tree_of(tmp_path / "quiet")
    del expected["commits/lock"]
    return manifest, corpus, expected


LONGEST = 600  # seconds for a store that takes three, ten on a busy machine


class Tries:
    """What is counted of all that was tried."""

    def __init__(self) -> None:
        self.runs = self.errors = 0
        self.last: BaseException | None = None
        self._end = time.monotonic() + LONGEST
        self.unnamed: list[BaseException] = []

    def begin(self) -> None:
        """Trying for ever is as bad as losing something: it ends in what stood in the way last."""
        self.runs += 1
        if time.monotonic() > self._end:
            raise AssertionError(f"{self.runs} commands in {LONGEST} s, and no end: {self.last!r}")


def keep_writing(synthetic: Any, url: str, material: Any, tries: Tries) -> None:
    """The same command again and again, until the store is whole."""
    manifest, corpus, _ = material
    while True:
        try:
            tries.begin()
            synthetic.write_store(url, manifest, corpus)
            with Store.open(url) as store:
                if store.committed.all():
                    return
        except StoreBusy as error:
            tries.last = error
        except StoreError as error:
            tries.errors, tries.last = tries.errors + 1, error
            assert not isinstance(error, StoreUnreachable) or "run the same command again" in str(error)
        except Exception as error:  # noqa: BLE001 (a thread must not lose what it is for)
            tries.unnamed.append(error)
            return
        time.sleep(0.05)  # another writer holds what lacks


def side_by_side(work: Callable[[], None], writers: int = 2) -> None:
    threads = [threading.Thread(target=work) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def stored(synthetic: Any, url: str) -> dict[str, str]:
    """All but claims, which one may have left whose answers were lost."""
    return {name: found for name, found in synthetic.objects_of(url).items() if not name.startswith("claims/")}


def write_and_read_badly(synthetic, proxy, material, share: float, seed: int) -> Tries:
    """Write by two, then read all as often as it takes; what is read is right, or it is not read."""
    url, tries = f"s3://mill/{uuid.uuid4().hex}", Tries()
    proxy.draw.seed(seed)
    proxy.share = share
    side_by_side(lambda: keep_writing(synthetic, url, material, tries))
    _, corpus, expected = material
    done = False
    while not done and not tries.unnamed:
        try:
            tries.begin()
            with Store.open(url) as store:
                for part in store.stream(EVERYTHING):
                    start, stop = part.span.start, part.span.stop
                    assert np.array_equal(part.resid[3], corpus.resid[3][start:stop])
                    assert np.array_equal(part.attention[2].dense(), corpus.attention[2].slice(start, stop).dense())
                    assert np.array_equal(part.tokens, corpus.tokens[start:stop])
            done = True
        except StoreUnreachable as error:
            tries.errors, tries.last = tries.errors + 1, error
        except AssertionError as error:
            tries.unnamed.append(error)
    proxy.share = 0.0
    assert not tries.unnamed, tries.unnamed
    assert stored(synthetic, url) == expected
    return tries


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("short_leases")
def test_two_writers_behind_a_bad_network(synthetic, proxy, material, tell):
    proxy.requests, errors, runs = 0, 0, 0
    proxy.faults.clear()
    for seed in range(1, 21):
        tries = write_and_read_badly(synthetic, proxy, material, share=0.02 * (seed % 5 + 1), seed=seed)
        runs, errors = runs + tries.runs, errors + tries.errors
    tell(f"20 stores on S3, {runs:,} commands, {proxy.requests:,} requests, {errors:,} named errors", proxy.faults)


def test_a_claim_whose_answer_was_lost_is_the_writers_own():
    """The server has created it and refuses the second attempt: nobody would hold the shard until it lapses."""
    files = open_files(f"memory://{uuid.uuid4().hex}")
    assert isinstance(files, RemoteFiles)
    one, other = LeaseClaims(files), LeaseClaims(files)
    create = files.create
    files.create = lambda key, data: create(key, data) and False  # type: ignore[method-assign]
    assert one.take(0)
    assert not other.take(0) and not one.take(0)
    one.close()
    other.close()


def test_a_server_that_names_no_condition_refuses_too(proxy, monkeypatch):
    """AWS says which condition did not hold, others do not; s3fs then knows no file that exists."""
    files = open_files(f"s3://mill/{uuid.uuid4().hex}")
    assert isinstance(files, RemoteFiles)
    monkeypatch.setattr(proxy, "kinds", ("no condition",))
    monkeypatch.setattr(proxy, "share", 1.0)
    one, other = LeaseClaims(files), LeaseClaims(files)
    assert one.take(3)
    assert not other.take(3)
    one.close()


@pytest.mark.parametrize("conflicts", [2, 9])
def test_a_claim_that_is_just_being_removed_is_tried_again(monkeypatch, conflicts):
    """AWS answers so to who creates what another removes at this moment; not for ever."""
    files = open_files(f"memory://{uuid.uuid4().hex}")
    assert isinstance(files, RemoteFiles)
    answer = {"Error": {"Code": "ConditionalRequestConflict"}, "ResponseMetadata": {"HTTPStatusCode": 409}}
    left, pipe = [OSError(errno.EIO, "conflict") for _ in range(conflicts)], files.fs.pipe_file

    def conflict(*args: Any, **kwargs: Any) -> None:
        if left:
            raise left.pop() from botocore.exceptions.ClientError(answer, "PutObject")
        pipe(*args, **kwargs)

    monkeypatch.setattr(files_module, "CONFLICT_PAUSES", (0.0,) * 3)
    monkeypatch.setattr(files.fs, "pipe_file", conflict)
    if conflicts == 2:
        assert files.create("claims/0.json", b"mine") and files.read("claims/0.json") == b"mine"
    else:
        with pytest.raises(StoreUnreachable, match="conflict"):
            files.create("claims/0.json", b"mine")
        assert len(left) == 9 - 4


def pass_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 1.1 * claims_module.LEASE_SECONDS)


@pytest.mark.faults
def test_two_writers_that_see_one_lapsed_lease(synthetic, material, monkeypatch, tell):
    """Both may take it, in the moment between a look and a removal: they write the same bytes, and one record."""
    manifest, corpus, expected = material
    url = f"memory://{uuid.uuid4().hex}"
    StoreWriter.create(url, manifest, corpus.tokens, corpus.documents).close()
    files = open_files(url)
    assert isinstance(files, RemoteFiles)
    meet = threading.Barrier(2, timeout=20)
    dead = LeaseClaims(files)
    assert dead.take(0)
    dead.close()
    pass_lease(monkeypatch)
    lapsed = LeaseClaims._has_lapsed

    def together(claims: LeaseClaims, number: int) -> bool:
        found = lapsed(claims, number)
        if number == 0 and not wrote:
            meet.wait()
        return found

    wrote: list[int] = []
    monkeypatch.setattr(LeaseClaims, "_has_lapsed", together)

    def write() -> None:
        with StoreWriter.open(url) as writer:
            wrote.extend(synthetic.write_pending(writer, corpus))

    side_by_side(write)
    monkeypatch.setattr(LeaseClaims, "_has_lapsed", lapsed)
    pass_lease(monkeypatch)
    synthetic.write_store(url, manifest, corpus)
    assert {0} <= set(wrote)
    with Store.open(url) as store:
        assert store.committed.all()
        for part in store.stream(EVERYTHING):
            assert np.array_equal(part.resid[3], corpus.resid[3][part.span.start : part.span.stop])
    assert stored(synthetic, url) == expected
    tell("1 store by two writers", {"lapsed lease that both saw": 1})


def test_who_slept_through_a_lease_overwrites_nothing(synthetic, material, monkeypatch):
    """Of another device its bytes may be others: chunks of both under one record would be nobody's."""
    manifest, corpus, _ = material
    url = f"memory://{uuid.uuid4().hex}"
    content = synthetic.make_content(manifest, corpus, 0)
    chunk = arrays_of(manifest)["resid/layer_3"].chunk_key(0)
    with StoreWriter.create(url, manifest, corpus.tokens, corpus.documents) as slept, StoreWriter.open(url) as other:
        files = slept.files
        with ExitStack() as claims:
            assert claims.enter_context(slept.claim(0))
            later = time.time() + 11 * 60
            monkeypatch.setattr(time, "time", lambda: later)
            with other.claim(0) as is_mine:
                assert is_mine
                assert slept.write(0, content) is None and not files.exists(chunk)
                claims.close()
                assert not LeaseClaims(files).take(0), "the claim of the other one is gone"
                assert other.write(0, content) is not None and files.exists(chunk)


def test_a_store_that_another_began_meanwhile_keeps_its_root(synthetic, material, monkeypatch):
    manifest, corpus, _ = material
    url = f"memory://{uuid.uuid4().hex}"
    count, others = writer_module.count_all, synthetic.replace(manifest, codec="lz4")

    def sleep_and_count(*args: Any) -> Any:
        monkeypatch.setattr(writer_module, "count_all", count)
        later = time.time() + 11 * 60
        monkeypatch.setattr(time, "time", lambda: later)
        StoreWriter.create(url, others, corpus.tokens, corpus.documents).close()
        return count(*args)

    monkeypatch.setattr(writer_module, "count_all", sleep_and_count)
    with pytest.raises(StoreBusy, match="started a store at .* in the meantime"):
        StoreWriter.create(url, manifest, corpus.tokens, corpus.documents)
    with Store.open(url) as store:
        assert store.manifest.codec == "lz4"


@pytest.mark.parametrize("until", ["NaN", "Infinity", "4e12", '"x"', "null", "[" * 5000 + "]" * 5000])
def test_a_claim_of_a_wrong_clock_lapses(until):
    """Nobody would ever get its shard."""
    files = open_files(f"memory://{uuid.uuid4().hex}")
    assert isinstance(files, RemoteFiles)
    claims = LeaseClaims(files)
    files.replace("claims/0.json", f'{{"owner": "somebody", "until": {until}}}'.encode())
    assert claims_module.find_held(files, 1) == {}
    assert claims.take(0)
    claims.close()


@pytest.mark.faults
def test_stale_listings_hide_shards_and_lose_none(synthetic, material, monkeypatch, tell):
    """A listing of some time ago: what is committed meanwhile is not written again, and is found later."""
    manifest, corpus, expected = material
    url = f"memory://{uuid.uuid4().hex}"
    listing, old, turns = RemoteFiles.list, {}, iter(range(10**6))
    stale_ones: list[bool] = []

    def stale(files: RemoteFiles, folder: str) -> list[str]:
        now = listing(files, folder)
        before = old.get(folder, [])
        if next(turns) % 2:
            stale_ones.append(before != now)
            return before
        old[folder] = now
        return now

    monkeypatch.setattr(RemoteFiles, "list", stale)
    written: list[int] = []
    with (
        StoreWriter.create(url, manifest, corpus.tokens, corpus.documents) as one,
        StoreWriter.create(url, manifest, corpus.tokens, corpus.documents) as two,
    ):
        for _ in range(manifest.shards):
            written += synthetic.write_pending(one, corpus, one.pending()[:1])
            written += synthetic.write_pending(two, corpus, two.pending()[:2])
    monkeypatch.setattr(RemoteFiles, "list", listing)
    synthetic.write_store(url, manifest, corpus)
    assert sorted(set(written)) == sorted(written)
    assert stored(synthetic, url) == expected
    assert any(stale_ones)
    tell("1 store by two writers", {"listing of before": sum(stale_ones)})


@pytest.mark.faults
def test_a_server_that_hangs_is_named_and_nothing_is_lost(synthetic, proxy, material, monkeypatch, tell):
    """Nobody waits for ever: s3fs gives up after 15 s, here after a fifth of one, and tries again."""
    manifest, corpus, expected = material
    url, kinds = f"s3://mill/{uuid.uuid4().hex}", proxy.kinds
    synthetic.write_store(url, manifest, corpus, shards=[0])
    before = proxy.faults["hanging"]
    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "read_timeout", 0.2)
        patch.setattr(s3fs.S3FileSystem, "cachable", False)  # or what is there already would wait its own time
        proxy.kinds, proxy.share = ("hanging",), 1.0
        try:
            with pytest.raises(StoreUnreachable, match="run the same command again"):
                Store.open(url)
        finally:
            proxy.kinds, proxy.share = kinds, 0.0
    forget_instances()
    synthetic.write_store(url, manifest, corpus)
    assert stored(synthetic, url) == expected
    tell("1 store on S3", {"request that nobody answers": proxy.faults["hanging"] - before})


@pytest.mark.faults
def test_a_disk_that_hangs_holds_up_one_writer_and_one_shard(synthetic, material, tmp_path, monkeypatch, tell):
    manifest, corpus, expected = material
    place, goes_on, hangs, write = tmp_path / "store", threading.Event(), threading.Event(), os.write

    def hang(fd: int, data: Any) -> int:
        if "resid/layer_3/c.0" in os.readlink(f"/proc/self/fd/{fd}"):
            hangs.set()
            goes_on.wait(120)
        return write(fd, data)

    StoreWriter.create(place, manifest, corpus.tokens, corpus.documents).close()
    monkeypatch.setattr(os, "write", hang)
    hung = threading.Thread(target=synthetic.write_store, args=(place, manifest, corpus))
    hung.start()
    try:
        assert hangs.wait(120)
        with StoreWriter.open(place) as other:
            assert synthetic.write_pending(other, corpus) == list(range(1, manifest.shards))
        with Store.open(place) as store:
            assert store.committed.tolist() == [False] + [True] * (manifest.shards - 1)
            for shard in range(1, manifest.shards):
                start, stop = manifest.shard_range(shard)
                part = store.read(EVERYTHING, Span(shard, start, stop))
                assert np.array_equal(part.resid[3], corpus.resid[3][start:stop])
    finally:
        goes_on.set()
        hung.join()
    found = synthetic.tree_of(place)
    del found["commits/lock"]
    assert found == expected
    tell("1 store by two writers", {"write that hangs": 1})


@pytest.mark.faults
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_disk_that_fails_while_it_is_read_is_named(material, tmp_path, monkeypatch, number, tell):
    """In any call of a reader; a read that is short is read on."""
    _, corpus, _ = material
    faults: Counter[str] = Counter()
    with Store.open(tmp_path / "quiet") as store:
        preadv = os.preadv

        def give_less(fd: int, buffers: Any, at: int) -> int:
            faults["short read"] += len(buffers[0]) > 7
            return preadv(fd, [buffers[0][:7]], at)

        monkeypatch.setattr(os, "preadv", give_less)
        for part in store.stream(EVERYTHING):
            assert np.array_equal(part.resid[3], corpus.resid[3][part.span.start : part.span.stop])

        def fail(*_: Any, **__: Any) -> Any:
            faults[errno.errorcode[number]] += 1
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "preadv", fail)
        monkeypatch.setattr(Path, "read_bytes", fail)
        with pytest.raises(StoreUnreachable, match=r"while reading .* run the same command again"):
            list(store.stream(EVERYTHING))
        files = LocalFiles(tmp_path / "quiet")
        with pytest.raises(StoreUnreachable, match="while reading zarr.json"):
            Store(files)
    tell("1 store, read", faults)


def test_a_disk_that_fails_is_not_taken_for_a_file_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "commits").mkdir()
    files = LocalFiles(tmp_path)
    asks = {
        "for zarr.json": lambda: files.exists("zarr.json"),
        "into commits": lambda: files.which_exist("commits", "1"),
    }

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    for place, ask in asks.items():
        assert not ask()
        with (
            pytest.raises(StoreUnreachable, match=f"Stale file handle while looking {place}"),
            monkeypatch.context() as patch,
        ):
            patch.setattr(os, "stat", fail)
            ask()


def test_a_connection_that_fails_is_not_taken_for_a_file_that_is_not_there(monkeypatch):
    """fsspec's own `exists` is False of whatever goes wrong while it looks."""
    files = open_files(f"memory://{uuid.uuid4().hex}")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("reset")

    assert not files.exists("zarr.json")
    monkeypatch.setattr(files.fs, "info", fail)
    with pytest.raises(StoreUnreachable, match="ConnectionError while looking for zarr.json"):
        files.exists("zarr.json")


def test_a_store_that_a_file_system_wrongly_says_is_not_there_is_not_begun_again(synthetic, monkeypatch):
    """fsspec's own `exists` is False of whatever goes wrong while it looks."""
    manifest, url = synthetic.make_manifest(), f"memory://{uuid.uuid4().hex}"
    corpus = synthetic.write_store(url, manifest)
    before = synthetic.objects_of(url)
    monkeypatch.setattr(RemoteFiles, "exists", lambda *_: False)
    with pytest.raises(StoreMismatch, match="codec"):
        StoreWriter.create(url, synthetic.replace(manifest, codec="zstd"), corpus.tokens, corpus.documents)
    assert synthetic.objects_of(url) == before
