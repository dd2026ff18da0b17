"""All windows of a corpus on disk: shares, splits, resuming, and corpora that are too small."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from saemill.cache_schema import StoreUnreachable
from saemill.cache_schema.disk_and_cloud_files import LocalFiles
from saemill.cache_schema.splits import split_of
from saemill.harvest import tokenise_corpus
from saemill.harvest.errors import CorpusEmpty, DocumentInvalid, NetworkLost, SplitEmpty
from saemill.harvest.pack_windows import Packer
from saemill.harvest.tokenise_corpus import PackedCorpus, PackingJob, Spool, spool_corpus

CONTEXT = 8
BOS = 2


class BytesEncoder:
    """One token a byte."""

    digest = "bytes"
    bos_token = BOS
    special_tokens = (BOS,)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[byte + 3 for byte in text.encode()] for text in texts]


@dataclass
class ListCorpus:
    """Texts in memory; may be interrupted."""

    texts: list[str]
    stop_at: int | None = None
    error: type[BaseException] = KeyboardInterrupt
    id: str = "list"
    revision: str = "1"
    settings: dict[str, Any] = field(default_factory=dict)
    read: int = 0

    def documents(self, state: dict[str, Any] | None = None) -> Iterator[str]:
        self.read = (state or {"documents": 0})["documents"]
        for text in self.texts[self.read :]:
            if self.read == self.stop_at:
                raise self.error
            self.read += 1
            yield text

    def state(self) -> dict[str, Any]:
        return {"documents": self.read}


def make_texts(count: int) -> list[str]:
    return [f"document {i} " + "x" * (i * 7 % 23) for i in range(count)]


def pack(corpus: ListCorpus, folder: Path, windows: int = 100, packing: Any = "concat") -> PackedCorpus:
    encoder: Any = BytesEncoder()
    return spool_corpus(corpus, encoder, PackingJob(windows, CONTEXT, packing), folder)[1]


@pytest.fixture
def small_batches(monkeypatch):
    """A checkpoint after every few documents."""
    monkeypatch.setattr(tokenise_corpus, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(tokenise_corpus, "CHECKPOINT_SECONDS", -1.0)


def test_each_split_is_packed_by_itself_up_to_its_share(tmp_path):
    texts = make_texts(800)
    packed = pack(ListCorpus(texts), tmp_path)
    assert packed.splits == {"train": (0, 92), "validation": (92, 96), "test": (96, 100)}
    for split, (start, stop) in packed.splits.items():
        numbers = [i for i, text in enumerate(texts) if split_of(text) == split]
        alone = Packer(CONTEXT, BOS).pack(BytesEncoder().encode([texts[i] for i in numbers]), numbers)
        assert np.array_equal(packed.tokens[start:stop], alone.tokens[: stop - start])
        assert np.array_equal(packed.documents[start:stop], alone.documents[: stop - start])


def test_no_text_is_in_two_splits(tmp_path):
    """Nor where two documents have it."""
    texts = [text for text in make_texts(400) for _ in range(2)]
    packed = pack(ListCorpus(texts), tmp_path, windows=10_000)
    owners = [{texts[number] for number in packed.documents[slice(*ends)].flat} for ends in packed.splits.values()]
    assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])


def test_a_corpus_that_ends_early_gives_what_it_has(tmp_path):
    packed = pack(ListCorpus(make_texts(60)), tmp_path, windows=10_000)
    assert packed.splits["test"][1] == len(packed.tokens) < 10_000
    assert (packed.tokens[:, 0] == BOS).all()


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_an_interrupted_run_goes_on_to_the_same_windows(tmp_path, packing):
    texts = make_texts(250)
    straight = pack(ListCorpus(texts), tmp_path / "straight", 600, packing)
    for stop_at in (1, 17, 60, 130):
        folder = tmp_path / f"stopped at {stop_at}"
        with pytest.raises(KeyboardInterrupt):
            pack(ListCorpus(texts, stop_at), folder, 600, packing)
        resumed = pack(ListCorpus(texts), folder, 600, packing)
        assert np.array_equal(straight.tokens, resumed.tokens)
        assert np.array_equal(straight.documents, resumed.documents)


@pytest.mark.usefixtures("small_batches")
def test_windows_behind_the_last_checkpoint_are_cut_off(tmp_path, monkeypatch):
    """A kill between two checkpoints leaves windows that nobody counts: kept, they would be there twice."""
    written = Spool.checkpoint

    def checkpoint(spool, state):
        written(spool, state)
        monkeypatch.setattr(tokenise_corpus, "CHECKPOINT_SECONDS", 1e9)

    straight = pack(ListCorpus(make_texts(250)), tmp_path / "straight", 600)
    monkeypatch.setattr(Spool, "checkpoint", checkpoint)
    with pytest.raises(KeyboardInterrupt):
        pack(ListCorpus(make_texts(250), 130), tmp_path / "stopped", 600)
    counted = checkpoint_of(tmp_path / "stopped")["counts"]
    bytes_of = {split: (tmp_path / "stopped" / f"{split}.tokens.u32").stat().st_size for split in counted}
    assert all(bytes_of[split] > counted[split] * CONTEXT * 4 for split in counted)
    resumed = pack(ListCorpus(make_texts(250)), tmp_path / "stopped", 600)
    assert resumed.splits == straight.splits
    assert np.array_equal(straight.tokens, resumed.tokens)
    assert np.array_equal(straight.documents, resumed.documents)


@pytest.mark.usefixtures("small_batches")
def test_resuming_reads_on_and_not_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pack(ListCorpus(make_texts(250), 90), tmp_path, 600)
    corpus = ListCorpus(make_texts(250))
    corpus.texts[:60] = ["never read"] * 60
    resumed = pack(corpus, tmp_path, 600)
    assert np.array_equal(resumed.tokens, pack(ListCorpus(make_texts(250)), tmp_path / "straight", 600).tokens)


@pytest.mark.usefixtures("small_batches")
def test_another_job_starts_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pack(ListCorpus(make_texts(250), 90), tmp_path, 600)
    changed = ListCorpus(make_texts(250)[30:], revision="2")
    expected = pack(ListCorpus(make_texts(250)[30:], revision="2"), tmp_path / "straight", 600)
    assert np.array_equal(pack(changed, tmp_path, 600).tokens, expected.tokens)


@pytest.mark.usefixtures("small_batches")
def test_a_job_that_comes_back_after_another_takes_none_of_its_text(tmp_path, monkeypatch):
    """The other is stopped before its first checkpoint, with more windows than the first one counted."""
    texts, others = make_texts(250), [text.upper() for text in make_texts(250)]
    expected = pack(ListCorpus(texts), tmp_path / "straight", 600)
    with pytest.raises(KeyboardInterrupt):
        pack(ListCorpus(texts, 60), tmp_path / "stopped", 600)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Spool, "checkpoint", lambda *_: None)
        pack(ListCorpus(others, 190, revision="2"), tmp_path / "stopped", 600)
    again = pack(ListCorpus(texts), tmp_path / "stopped", 600)
    assert np.array_equal(again.tokens, expected.tokens)
    assert np.array_equal(again.documents, expected.documents)


def checkpoint_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoint.json").read_text())


def test_a_slow_corpus_is_kept_every_few_seconds_though_no_batch_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise_corpus, "CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        pack(ListCorpus(make_texts(800), 300), tmp_path, 2000)
    assert checkpoint_of(tmp_path)["documents"] == 300


def test_what_came_before_a_lost_network_is_kept(tmp_path):
    """No batch is full and no second has passed: without a checkpoint of its own, all would be read again."""
    with pytest.raises(NetworkLost):
        pack(ListCorpus(make_texts(800), 300, NetworkLost), tmp_path / "lost", 2000)
    assert checkpoint_of(tmp_path / "lost")["corpus"] == {"documents": 300}
    resumed = pack(ListCorpus(["never read"] * 300 + make_texts(800)[300:]), tmp_path / "lost", 2000)
    straight = pack(ListCorpus(make_texts(800)), tmp_path / "straight", 2000)
    assert np.array_equal(resumed.tokens, straight.tokens)
    assert np.array_equal(resumed.documents, straight.documents)


@pytest.mark.parametrize("error", [KeyboardInterrupt, DocumentInvalid])
def test_a_document_that_was_never_packed_is_not_passed_over(tmp_path, error):
    with pytest.raises(error):
        pack(ListCorpus(make_texts(800), 300, error), tmp_path, 2000)
    assert not (tmp_path / "checkpoint.json").exists()


@pytest.mark.usefixtures("small_batches")
def test_what_a_checkpoint_counts_and_is_not_there_is_tokenised_again(tmp_path):
    """Cleared from a folder for temporary files, or lost with the power: it never becomes zeros."""
    straight = pack(ListCorpus(make_texts(200)), tmp_path / "straight", 400)
    with pytest.raises(KeyboardInterrupt):
        pack(ListCorpus(make_texts(200), 130), tmp_path / "stopped", 400)
    for damage, name in (
        (lambda file: os.truncate(file, 64), "train.tokens.u32"),
        (Path.unlink, "train.tokens.u32"),
        (lambda file: file.write_text("{"), "checkpoint.json"),
        (lambda file: file.write_text("[]"), "checkpoint.json"),
    ):
        again = tmp_path / "again"
        shutil.copytree(tmp_path / "stopped", again)
        damage(again / name)
        assert np.array_equal(pack(ListCorpus(make_texts(200)), again, 400).tokens, straight.tokens)
        shutil.rmtree(again)


@pytest.mark.usefixtures("small_batches")
def test_a_power_cut_makes_no_zeros(tmp_path, monkeypatch):
    """What is not flushed before the checkpoint that counts it may come back with its length and none of its bytes."""
    straight = pack(ListCorpus(make_texts(100)), tmp_path / "straight", 200)
    flushed, counted, replace_file = {}, {}, LocalFiles.replace

    def replaced(files, key, data):
        counted.update(flushed)
        replace_file(files, key, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenise_corpus, "sync", lambda path: flushed.update({path.name: path.stat().st_size}))
        patch.setattr(LocalFiles, "replace", replaced)
        pack(ListCorpus(make_texts(100), 70), tmp_path / "stopped", 200)
    for file in (tmp_path / "stopped").glob("*.u32"):
        size = file.stat().st_size
        os.truncate(file, counted.get(file.name, 0))
        os.truncate(file, size)
    assert np.array_equal(pack(ListCorpus(make_texts(100)), tmp_path / "stopped", 200).tokens, straight.tokens)


@pytest.mark.usefixtures("small_batches")
def test_a_resumed_job_first_reports_what_earlier_runs_did(tmp_path):
    job, encoder = PackingJob(2000, CONTEXT, "concat"), cast(Any, BytesEncoder())
    with pytest.raises(KeyboardInterrupt):
        spool_corpus(ListCorpus(make_texts(800), 300), encoder, job, tmp_path)
    kept = checkpoint_of(tmp_path)
    reports: list[tuple[int, int]] = []
    spool_corpus(ListCorpus(make_texts(800)), encoder, job, tmp_path, lambda *report: reports.append(report))
    assert reports[0] == (sum(kept["counts"].values()), kept["documents"])
    assert reports[0][1] == 300


def test_a_corpus_without_documents_is_empty(tmp_path):
    with pytest.raises(CorpusEmpty, match="no document"):
        pack(ListCorpus([]), tmp_path)


def test_a_corpus_without_text_is_empty(tmp_path):
    with pytest.raises(CorpusEmpty, match="no text"):
        pack(ListCorpus(["", ""]), tmp_path)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(
    ("settings", "more"),
    [({}, ""), ({"column": "text"}, ". If their text is in another column, name it with --column")],
)
def test_documents_without_text_are_told(tmp_path, settings, more):
    """Of a column that is half empty half is harvested. Those before an interruption count too."""
    texts = [text for one in make_texts(400) for text in (one, "")]
    job, encoder, said = PackingJob(2000, CONTEXT, "concat"), cast(Any, BytesEncoder()), []
    with pytest.raises(KeyboardInterrupt):
        spool_corpus(ListCorpus(texts, 301, settings=settings), encoder, job, tmp_path)
    spool_corpus(ListCorpus(texts, settings=settings), encoder, job, tmp_path, say=said.append)
    assert said == [f"warning: 400 of 800 documents read from list are empty or null{more}"]
    spool_corpus(ListCorpus(make_texts(400)), encoder, job, tmp_path / "full", say=said.append)
    assert len(said) == 1


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("is_of_before", [False, True])
def test_text_that_fills_no_window_of_one_document_is_told(tmp_path, is_of_before):
    """A corpus of short documents may lose most of itself. What an earlier version left out nobody counted."""
    texts = [f"{number}" + "a" * (number % (2 * CONTEXT)) for number in range(600)]
    job, encoder, said = PackingJob(9000, CONTEXT, "documents"), cast(Any, BytesEncoder()), []
    with pytest.raises(KeyboardInterrupt):
        spool_corpus(ListCorpus(texts, 301), encoder, job, tmp_path)
    counted = texts
    if is_of_before:
        kept = checkpoint_of(tmp_path)
        counted = texts[kept["documents"] :]
        kept = {name: kept[name] for name in kept if name not in ("left_out", "counts_all")}
        (tmp_path / "checkpoint.json").write_text(json.dumps(kept))
        with pytest.raises(KeyboardInterrupt):  # and again, from a checkpoint of this version
            spool_corpus(ListCorpus(texts, 501), encoder, job, tmp_path)
    spool_corpus(ListCorpus(texts), encoder, job, tmp_path, say=said.append)
    short = sum(len(text) < CONTEXT - 1 for text in counted)
    least, tokens = "at least " if is_of_before else "", sum(len(text) % (CONTEXT - 1) for text in counted)
    assert said == [
        f"--packing documents left out {least}{tokens:,} tokens: those of {short} documents shorter than a window of "
        f"{CONTEXT}, and the ends of others"
    ]
    spool_corpus(ListCorpus(make_texts(400)), encoder, replace(job, packing="concat"), tmp_path / "2", say=said.append)
    assert len(said) == 1


class Passing(ListCorpus):
    """Passes over as many documents as it gives, which reading alone shows."""

    @property
    def left_alone(self) -> str:
        return f"{self.read}"


def test_what_a_corpus_passes_over_is_told_at_once_and_again_where_reading_shows_more(tmp_path):
    """Also where so little is left that it fills no window."""
    job, encoder, said = PackingJob(2000, CONTEXT, "concat"), cast(Any, BytesEncoder()), []
    for name, texts in (("full", make_texts(400)), ("short", ["one"])):
        with nullcontext() if name == "full" else pytest.raises(SplitEmpty):
            spool_corpus(Passing(texts), encoder, job, tmp_path / name, say=said.append)
    assert said == ["warning: 0", "warning: 400", "warning: 0", "warning: 1"]


def test_too_few_documents_for_three_splits_are_refused(tmp_path):
    texts = [text for text in make_texts(50) if split_of(text) == "train"]
    with pytest.raises(SplitEmpty, match="in validation and test.* Give more text"):
        pack(ListCorpus(texts), tmp_path)
    with pytest.raises(SplitEmpty, match="in train and validation and test.* Give longer documents .*--packing concat"):
        pack(ListCorpus(["short"] * 50), tmp_path, packing="documents")  # of which no number would do


@pytest.mark.parametrize(
    ("owner", "name"), [(os, "truncate"), (Path, "open"), (tokenise_corpus, "sync"), (shutil, "copyfileobj")]
)
def test_a_disk_that_fails_is_named(tmp_path, monkeypatch, owner, name):
    """What it says of an open file names none: without more it would be a traceback."""
    if name == "truncate":  # of what an earlier start left
        pack(ListCorpus(make_texts(400)), tmp_path)
    real = getattr(owner, name)

    def fail(*args, **options):
        if name == "open" and args[1:] != ("ab",):
            return real(*args, **options)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(StoreUnreachable, match=f"Input/output error while tokenising into {tmp_path}"):
        pack(ListCorpus(make_texts(400)), tmp_path)
