"""Streaming from the hub, with a hub and a network that the tests can break."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from saemill.harvest.corpus import CorpusSource
from saemill.harvest.errors import CorpusUnavailable, DocumentInvalid, NetworkLost
from saemill.harvest.hub import HubCorpus, find_repository

TEXTS = [f"document {i}" for i in range(50)]
SOURCE = CorpusSource("owner/name")


@dataclass
class Network:
    """A real streamed data set whose connection breaks at given documents, and may stay broken."""

    path: str
    breaks: list[int] = field(default_factory=list)
    loads: int = 0

    def load(self) -> Any:
        self.loads += 1
        dataset = load_dataset("parquet", data_files={"train": self.path}, split="train", streaming=True)
        return dataset.map(self._maybe_break)

    def _maybe_break(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["text"].split()[1])
        if number in self.breaks:
            self.breaks.remove(number)
            raise ConnectionError("connection reset")
        return row


@pytest.fixture
def parquet(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=10)
    return str(tmp_path / "a.parquet")


def test_a_broken_connection_loses_and_repeats_nothing(parquet):
    network = Network(parquet, [0, 13, 14, 49])
    corpus = HubCorpus(SOURCE, "c0ffee", network.load, waits=(0, 0))
    assert list(corpus.documents()) == TEXTS
    assert network.loads == 5


def test_a_network_that_stays_away_stops_resumable(parquet):
    network = Network(parquet, [21, 21, 21])
    corpus = HubCorpus(SOURCE, "c0ffee", network.load, waits=(0, 0))
    with pytest.raises(NetworkLost, match=r"3 times in a row after 21 documents .*same command again"):
        list(corpus.documents())
    assert network.loads == 3


def test_reading_goes_on_from_a_saved_state(parquet):
    corpus = HubCorpus(SOURCE, "c0ffee", Network(parquet).load)
    documents = corpus.documents()
    head = [next(documents) for _ in range(17)]
    state = json.loads(json.dumps(corpus.state()))
    rest = list(HubCorpus(SOURCE, "c0ffee", Network(parquet).load).documents(state))
    assert head + rest == TEXTS


def test_bad_rows_of_a_stream_are_named(parquet):
    with pytest.raises(CorpusUnavailable, match="no column 'body'; it has text"):
        next(HubCorpus(CorpusSource("owner/name", column="body"), "c", Network(parquet).load).documents())
    with pytest.raises(DocumentInvalid, match="owner/name, document 0: expected text, found NoneType"):
        next(HubCorpus(SOURCE, "c", lambda: Network(parquet).load().map(lambda _: {"text": None})).documents())


class Hub:
    """Answers as `HfApi` does."""

    def __init__(self, **revisions: list[str]) -> None:
        self.revisions = revisions

    def dataset_info(self, _: str, revision: str | None, timeout: float) -> SimpleNamespace:
        name = {None: "main", "refs/convert/parquet": "converted"}.get(revision, revision)
        siblings = [SimpleNamespace(rfilename=file) for file in self.revisions[str(name)]]
        return SimpleNamespace(sha=f"commit-of-{name}", siblings=siblings)


def test_a_plain_repository_is_pinned_to_its_commit():
    repository = find_repository(SOURCE, Hub(main=["README.md", "data/a.parquet"]))
    assert (repository.commit, repository.files) == ("commit-of-main", ())


def test_a_script_repository_is_read_by_its_conversion():
    hub = Hub(
        main=["name.py"],
        converted=["plain/train/0001.parquet", "plain/train/0000.parquet", "plain/test/0000.parquet"],
    )
    repository = find_repository(SOURCE, hub)
    assert repository.commit == "commit-of-converted"
    assert repository.files == ("plain/train/0000.parquet", "plain/train/0001.parquet")


def test_a_partial_conversion_will_do():
    hub = Hub(main=["name.py"], converted=["plain/partial-train/0000.parquet"])
    assert find_repository(SOURCE, hub).files == ("plain/partial-train/0000.parquet",)


def test_several_configs_must_be_told_apart():
    hub = Hub(main=["name.py"], converted=["en/train/0.parquet", "fr/train/0.parquet"])
    with pytest.raises(CorpusUnavailable, match=r"en/train, fr/train.*--dataset-config"):
        find_repository(SOURCE, hub)
    assert find_repository(CorpusSource("owner/name", config="fr"), hub).files == ("fr/train/0.parquet",)
