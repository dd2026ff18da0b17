"""What is flushed when: the order of calls that a commit's promise stands on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from saemill.cache_schema import StoreWriter, disk_and_cloud_files
from saemill.cache_schema.disk_and_cloud_files import read_if_there


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(what was done, to which path), in order."""
    done: list[tuple[str, str]] = []
    replace = os.replace

    def record_sync(fd: int) -> None:
        done.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))

    def record_replace(source: str, target: str) -> None:
        done.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    return done


def test_every_chunk_and_its_folder_is_flushed_before_the_record_appears(synthetic, small_chunks, tmp_path, journal):
    manifest = synthetic.make_manifest()
    corpus = synthetic.make_corpus(manifest)
    with StoreWriter.create(tmp_path, manifest, corpus.tokens, corpus.documents) as writer, writer.claim(1):
        before = set(synthetic.tree_of(tmp_path))
        journal.clear()
        writer.write(1, synthetic.make_content(manifest, corpus, 1))
        chunks = {tmp_path / name for name in set(synthetic.tree_of(tmp_path)) - before if "/c." in name}
    record = ("replace", str(tmp_path / "commits/00001.json"))
    at = journal.index(record)
    flushed = {Path(path) for what, path in journal[:at] if what == "fsync"}
    assert len(chunks) == 2 * 2 + 2 + 2 * 4
    assert chunks <= flushed
    assert {chunk.parent for chunk in chunks} <= flushed
    assert tmp_path / "commits/.00001.json.tmp" in flushed
    for folder in {chunk.parent for chunk in chunks}:  # a name is durable only after its file is
        last = max(i for i, (_, path) in enumerate(journal[:at]) if Path(path).parent == folder)
        assert ("fsync", str(folder)) in journal[last:at]
    assert ("fsync", str(tmp_path / "commits")) in journal[at:]


def test_the_root_appears_last(synthetic, tmp_path, journal):
    manifest = synthetic.make_manifest()
    corpus = synthetic.make_corpus(manifest)
    StoreWriter.create(tmp_path, manifest, corpus.tokens, corpus.documents).close()
    begun = journal[: journal.index(("replace", str(tmp_path / "zarr.json")))]
    tokens = [("fsync", str(tmp_path / name / f"c.{i}.0")) for name in ("tokens", "documents") for i in range(6)]
    assert set(tokens) <= set(begun)
    assert ("fsync", str(tmp_path / "tokens")) in begun
    assert ("replace", str(tmp_path / "resid/layer_3/zarr.json")) in begun


def test_the_name_of_a_folder_whose_maker_died_is_flushed(tmp_path, monkeypatch):
    """Once in a process: it was made, and the maker was killed before its name was on the disk."""
    flushed = []
    monkeypatch.setattr(disk_and_cloud_files, "sync", flushed.append)
    (tmp_path / "left").mkdir()
    disk_and_cloud_files.make_folder(tmp_path / "left")
    disk_and_cloud_files.make_folder(tmp_path / "left")
    assert flushed == [tmp_path]
    disk_and_cloud_files.make_folder(tmp_path / "left" / "new")
    disk_and_cloud_files.make_folder(tmp_path / "left" / "new")
    assert flushed == [tmp_path, tmp_path / "left"]


def test_a_folder_below_one_that_nobody_may_read_can_be_used(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(disk_and_cloud_files, "sync", refuse)
    disk_and_cloud_files.make_folder(tmp_path)


def test_a_file_is_there_that_a_disk_of_the_network_remembers_as_missing(tmp_path, monkeypatch):
    """Until its folder is opened: another node may have committed a shard since it was looked for."""
    (tmp_path / "commits").mkdir()
    (tmp_path / "commits/7.json").write_bytes(b"here")
    opened, read, open_file = [], Path.read_bytes, os.open

    def read_what_is_known(path):
        if path.parent not in opened:
            raise FileNotFoundError
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_what_is_known)
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append(path) or open_file(path, flags))
    assert read_if_there(disk_and_cloud_files.LocalFiles(tmp_path), "commits/7.json") == b"here"
