"""`sae-store watch`: what all writers have done and do, until the store is whole."""

from __future__ import annotations

import errno
import uuid
from contextlib import closing
from functools import partial

import pytest
from click.testing import CliRunner
from rich.console import Console

from saemill.cache_schema import StoreMissing, StoreWriter, cli
from saemill.cache_schema.cli import main
from saemill.cache_schema.disk_and_cloud_files import open_files
from saemill.cache_schema.shard_claims import find_held, open_claims
from saemill.cache_schema.watch import Progress, follow


@pytest.fixture(params=["disk", "memory"])
def url(request, tmp_path) -> str:
    return str(tmp_path / "store") if request.param == "disk" else f"memory://{uuid.uuid4().hex}"


def test_two_writers_are_followed_until_the_store_is_whole(synthetic, url):
    """A clock of ten seconds a look: six shards, one in the first look, two in each further one."""
    manifest = synthetic.make_manifest()
    corpus = synthetic.make_corpus(manifest)
    now = iter(range(0, 1000, 10))
    with (
        StoreWriter.create(url, manifest, corpus.tokens, corpus.documents) as one,
        StoreWriter.create(url, manifest, corpus.tokens, corpus.documents) as two,
    ):
        synthetic.write_pending(one, corpus, [0])
        looks = follow(url, 10, clock=lambda: float(next(now)), sleep=lambda _: None)
        with one.claim(1), two.claim(3), two.claim(4):
            first = next(looks)
            assert (first.committed, first.shards, first.rate) == (1, 6, None)
            assert set(first.held) == {1, 3, 4}
            assert len(set(first.held.values())) == (1 if "/" in url[:1] else 2)
            assert str(first).startswith("1 of 6 shards are committed, ")
        synthetic.write_pending(two, corpus, [1, 2])
        second = next(looks)
        assert (second.committed, second.held, second.rate, second.seconds_left) == (3, {}, 0.2, 15)
        assert str(second) == "3 of 6 shards are committed, nobody is writing, 12.0 a minute, 15 seconds left"
        synthetic.write_pending(one, corpus)
        last = next(looks)
        assert last.is_whole and str(last) == "6 of 6 shards are committed: the store is whole"
        with pytest.raises(StopIteration):
            next(looks)


def test_every_lock_of_every_writer_is_found(tmp_path):
    """The kernel lists locks by their owner, so the first that it names need not be the lowest."""
    files = open_files(tmp_path)
    one, two = open_claims(files), open_claims(files)
    for claims, shards in ((one, (10, 13, 19)), (two, (4, 11, 0))):
        assert all(map(claims.take, shards))
    with closing(one), closing(two):
        assert set(find_held(files, 20)) == {0, 4, 10, 11, 13, 19}
        assert set(find_held(files, 11)) == {0, 4, 10}
    assert find_held(files, 20) == {}


def test_a_system_that_does_not_tell_locks_is_not_taken_for_silence(synthetic, tmp_path, monkeypatch):
    synthetic.write_store(tmp_path, synthetic.make_manifest(), shards=[0])
    unknown = "1 of 6 shards are committed, who is writing is unknown"

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.fcntl", refuse)
    assert str(next(follow(str(tmp_path), 1))) == unknown
    monkeypatch.delattr("fcntl.F_OFD_GETLK")
    assert str(next(follow(str(tmp_path), 1))) == unknown


def test_off_a_terminal_it_prints_lines_and_ends(synthetic, tmp_path):
    synthetic.write_store(tmp_path, synthetic.make_manifest())
    before = synthetic.tree_of(tmp_path)
    done = CliRunner().invoke(main, ["watch", str(tmp_path)])
    assert (done.exit_code, done.output) == (0, "6 of 6 shards are committed: the store is whole\n")
    assert synthetic.tree_of(tmp_path) == before


def test_on_a_terminal_a_name_that_looks_like_markup_is_none(monkeypatch):
    monkeypatch.setattr(cli, "Console", partial(Console, force_terminal=True))
    monkeypatch.setattr(cli, "follow", lambda *_: iter([Progress(2, 1, {1: "[/bold]"}, None)]))
    assert "1 held by [/bold]" in CliRunner().invoke(main, ["watch", "store"], catch_exceptions=False).output


def test_no_store_is_a_named_error(tmp_path):
    with pytest.raises(StoreMissing):
        next(follow(str(tmp_path), 1))
    assert not list(tmp_path.iterdir())
