"""How many tokens of each window train: told by the store, counted where it is older than that."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest

from saemill.cache_schema import ManifestInvalid, Request, Store, StoreWriter
from saemill.cache_schema.disk_and_cloud_files import LocalFiles
from saemill.cache_schema.token_counts_and_summary import pair_share
from saemill.cache_schema.verify_and_repair import drop_broken_derived, repair

COUNTS = "stats/counts.json"


@pytest.fixture
def corpus(synthetic, tmp_path):
    corpus = synthetic.make_corpus(synthetic.make_manifest())
    corpus.documents[:] = np.arange(corpus.documents.size).reshape(corpus.documents.shape) // 13
    synthetic.write_store(tmp_path, synthetic.make_manifest(), corpus)
    return corpus


def test_they_are_those_of_the_tokens(synthetic, corpus, tmp_path):
    with Store(tmp_path) as store:
        for split, (start, stop) in store.manifest.splits.items():
            trains = corpus.tokens[start:stop] != synthetic.SPECIAL
            per_window, numbers = store.counts(split)
            assert per_window.tolist() == trains.sum(1).tolist() and numbers.tokens == trains.sum()
            ids = corpus.documents[start:stop]
            for found, members in ((numbers.same_document, ids[trains]), (numbers.same_first_document, ids[:, 0])):
                pairs = list(combinations(members.tolist(), 2))
                assert found == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


def test_a_store_of_before_gives_the_same(corpus, tmp_path):
    with Store(tmp_path) as store:
        told = {split: store.counts(split) for split in store.manifest.splits}
    (tmp_path / COUNTS).unlink()
    with Store(tmp_path) as store:
        for split, (per_window, numbers) in told.items():
            counted = store.counts(split)
            assert counted[0].tolist() == per_window.tolist() and counted[1] == numbers


def test_repair_makes_the_same_file_again(corpus, tmp_path):
    before = (tmp_path / COUNTS).read_bytes()
    (tmp_path / COUNTS).unlink()
    repair(str(tmp_path), [])
    assert (tmp_path / COUNTS).read_bytes() == before


def test_no_token_is_read_where_the_store_tells(corpus, tmp_path, monkeypatch):
    with Store(tmp_path) as store:
        monkeypatch.setattr(store, "read_beginning", lambda *_: pytest.fail("tokens were read"))
        store.counts("train")


def test_a_writer_only_asks_whether_they_are_there_and_a_store_reads_them_once(corpus, tmp_path, monkeypatch):
    """They are a number a window, of a large store many megabytes."""
    reads, read = [], LocalFiles.read
    monkeypatch.setattr(LocalFiles, "read", lambda files, key: reads.append(key) or read(files, key))
    StoreWriter.open(tmp_path).close()
    assert reads and COUNTS not in reads
    with Store(tmp_path) as store:
        for split in store.manifest.splits:
            store.counts(split)
    assert reads.count(COUNTS) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw["trainable"].__setitem__(1, raw["trainable"][1] - 1), "tokens in the windows of train"),
        (lambda raw: raw["trainable"].__setitem__(1, True), r"trainable\[1\]: expected a whole number"),
        (lambda raw: raw["trainable"].__setitem__(1, -1), "expected 0 to 8 tokens"),
        (lambda raw: raw["trainable"].__setitem__(1, 2**70), "expected 0 to 8 tokens"),
        (lambda raw: raw["trainable"].pop(), "expected 22 windows, found 21"),
        (lambda raw: raw.update(cache_id="other"), "belongs to another store"),
        (lambda raw: raw["splits"].pop("test"), "tokens in the windows of test"),
        (lambda raw: raw.pop("splits"), "splits"),
    ],
)
def test_a_changed_file_is_refused_and_mended(corpus, tmp_path, change, said):
    path = tmp_path / COUNTS
    before = path.read_bytes()
    raw = json.loads(before)
    change(raw)
    path.write_text(json.dumps(raw))
    with Store(tmp_path) as store, pytest.raises(ManifestInvalid, match=f"{said}.*sae-store repair"):
        store.counts("train")
    assert drop_broken_derived(str(tmp_path)) == [COUNTS]
    repair(str(tmp_path), [])
    assert path.read_bytes() == before


def test_an_unfinished_split_is_refused_as_before(corpus, tmp_path):
    (tmp_path / "commits/00001.json").unlink()
    (tmp_path / "commits/index.json").unlink()
    with Store(tmp_path) as store, pytest.raises(Exception, match="not committed"):
        store.spans(Request(tokens=True, split="train"))
    with Store(tmp_path) as store, pytest.raises(Exception, match="not committed"):
        store.counts("train")


def test_pairs_are_all_pairs():
    assert pair_share(np.array([2, 1])) == pytest.approx(1 / 3)
    assert pair_share(np.ones(9)) == pair_share(np.zeros(0)) == 0.0


def test_damaged_tokens_of_a_store_of_before_can_be_repaired(corpus, tmp_path):
    (tmp_path / COUNTS).unlink()
    (tmp_path / "tokens/c.1.0").unlink()
    repair(str(tmp_path), [1])
    assert not (tmp_path / COUNTS).exists()
