"""Streaming from the hub, with a hub and a network that the tests can break."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import config, load_dataset
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from saemill.harvest.corpus.hugging_face import CONVERSION, HubCorpus, Repository, find_repository, open_hub
from saemill.harvest.corpus.local import LocalCorpus
from saemill.harvest.corpus.source import DatasetOptions
from saemill.harvest.errors import CorpusUnavailable, DocumentInvalid, NetworkLost
from saemill.harvest.network import load_dataset as load_quietly

TEXTS = [f"document {i}" for i in range(50)]
SOURCE = DatasetOptions("owner/name")
PINNED = Repository("owner/name", "c0ffee")


@dataclass
class Network:
    """A real streamed data set whose connection breaks at given documents, and may stay broken."""

    path: str
    breaks: list[int] = field(default_factory=list)
    loads: int = 0
    error: Exception = field(default_factory=lambda: ConnectionError("connection reset"))

    def load(self) -> Any:
        self.loads += 1
        dataset = load_dataset("parquet", data_files={"train": self.path}, split="train", streaming=True)
        return dataset.map(self._maybe_break)

    def _maybe_break(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["text"].split()[1])
        if number in self.breaks:
            self.breaks.remove(number)
            raise self.error
        return row


@pytest.fixture
def parquet(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=10)
    return str(tmp_path / "a.parquet")


def test_a_broken_connection_loses_and_repeats_nothing(parquet):
    network = Network(parquet, [0, 13, 14, 49])
    corpus = HubCorpus(SOURCE, PINNED, network.load, waits=(0, 0))
    assert list(corpus.documents()) == TEXTS
    assert network.loads == 5


def test_a_network_that_stays_away_stops_resumable(parquet):
    network = Network(parquet, [21, 21, 21])
    corpus = HubCorpus(SOURCE, PINNED, network.load, waits=(0, 0))
    with pytest.raises(NetworkLost, match=r"3 times in a row after 21 documents .*same command again"):
        list(corpus.documents())
    assert network.loads == 3


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_takes_no_files_is_no_lost_network(number, parquet):
    network = Network(parquet, [21, 21, 21], error=OSError(number, os.strerror(number), "/cache"))
    with pytest.raises(CorpusUnavailable, match="kept under HF_HOME: free some space there"):
        list(HubCorpus(SOURCE, PINNED, network.load, waits=(0, 0)).documents())
    assert network.loads == 1


def test_a_stream_does_not_wait_for_long_inside_another_library(parquet):
    """Twenty times for five seconds, or for a minute, in each of our own tries."""
    load_quietly("parquet", data_files={"train": parquet}, split="train", streaming=True)
    assert config.STREAMING_READ_MAX_RETRIES == config.STREAMING_OPEN_MAX_RETRIES == 2


def test_reading_goes_on_from_a_saved_state(parquet):
    corpus = HubCorpus(SOURCE, PINNED, Network(parquet).load)
    documents = corpus.documents()
    head = [next(documents) for _ in range(17)]
    state = json.loads(json.dumps(corpus.state()))
    rest = list(HubCorpus(SOURCE, PINNED, Network(parquet).load).documents(state))
    assert head + rest == TEXTS


def test_bad_rows_of_a_stream_are_named(parquet):
    with pytest.raises(CorpusUnavailable, match="no column 'body'; it has text"):
        next(HubCorpus(DatasetOptions("owner/name", column="body"), PINNED, Network(parquet).load).documents())
    with pytest.raises(DocumentInvalid, match="owner/name, document 0: expected text, found int"):
        next(HubCorpus(SOURCE, PINNED, lambda: Network(parquet).load().map(lambda _: {"text": 7})).documents())


def test_a_row_without_text_is_an_empty_document(tmp_path):
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    assert list(streamed(rows).documents()) == list(LocalCorpus(rows).documents()) == ["one", "", "two"]


def streamed(path: Path) -> HubCorpus:
    """A corpus of one file, on a network that is never waited for."""
    kind = "json" if path.suffix == ".jsonl" else "parquet"
    return HubCorpus(
        SOURCE,
        PINNED,
        lambda: load_dataset(kind, data_files={"train": str(path)}, split="train", streaming=True),
        waits=(),
    )


def test_a_row_that_is_no_utf8_is_a_bad_document(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
    with pytest.raises(DocumentInvalid, match=r"owner/name: a row after document 1 is not UTF-8"):
        list(streamed(tmp_path / "a.jsonl").documents())


@pytest.mark.parametrize("content", [b'{"text": "good"}\n{"text": oops}\n', b'{"text": "go'])
def test_jsonl_of_a_stream_that_is_no_json_is_damage(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(CorpusUnavailable, match=r"owner/name is damaged after document 0"):
        list(streamed(tmp_path / "a.jsonl").documents())


def test_a_corrupt_page_is_no_reason_to_wait_for_a_network(tmp_path):
    pq.write_table(pa.table({"text": TEXTS * 20}), tmp_path / "a.parquet", use_dictionary=False, compression="snappy")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 60] = bytes(60)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(CorpusUnavailable, match=r"owner/name is damaged after document 0 .*[Cc]orrupt"):
        list(streamed(tmp_path / "a.parquet").documents())


@pytest.mark.parametrize("error", [OSError("Corrupt snappy compressed data."), EOFError("Compressed file ended")])
def test_damage_further_on_says_how_far_the_stream_came(parquet, error):
    network = Network(parquet, [21], error=error)
    with pytest.raises(CorpusUnavailable, match=r"damaged after document 21 .*--dataset-revision"):
        list(HubCorpus(SOURCE, PINNED, network.load, waits=(0, 0)).documents())
    assert network.loads == 1


REFUSED = [
    *(
        kind("refused", response=SimpleNamespace(headers={}, request=None))  # pyright: ignore[reportArgumentType]
        for kind in (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError)
    ),
    HfHubHTTPError(
        "(Request ID: 1)\n\n403 Forbidden",
        response=SimpleNamespace(headers={}, request=None, status_code=403),  # pyright: ignore[reportArgumentType]
        server_message="Please enable access\nto gated repositories",
    ),
    *(kind("nothing there") for kind in (EmptyDatasetError, DataFilesNotFoundError, DatasetNotFoundError)),
]


@pytest.mark.parametrize("error", REFUSED, ids=lambda error: type(error).__name__)
def test_what_waiting_does_not_mend_is_not_waited_for(error):
    loads = []

    def refused() -> None:
        loads.append(None)
        raise error

    with pytest.raises(CorpusUnavailable, match=r"owner/name cannot be reached \([^\n(]+\): .*hf auth login"):
        list(HubCorpus(SOURCE, PINNED, refused, waits=(0, 0)).documents())
    assert len(loads) == 1


def test_a_package_that_a_proxy_takes_is_not_waited_for(parquet):
    network = Network(parquet, [21, 21], error=ImportError("Using SOCKS proxy"))
    with pytest.raises(CorpusUnavailable, match=r"Using SOCKS proxy\): .*`pip install socksio`"):
        list(HubCorpus(SOURCE, PINNED, network.load, waits=(0, 0)).documents())
    assert network.loads == 1


def test_a_name_that_the_hub_could_not_have_is_refused_without_asking():
    with pytest.raises(CorpusUnavailable, match="data set my data cannot be reached.*neither a local file"):
        open_hub(DatasetOptions("my data"))


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
    assert repository.part is None


def test_a_partial_conversion_will_do():
    hub = Hub(main=["name.py"], converted=["plain/partial-train/0000.parquet"])
    for source in (SOURCE, DatasetOptions("owner/name", revision=CONVERSION)):
        found = find_repository(source, hub)
        assert (found.commit, found.files) == ("commit-of-converted", ("plain/partial-train/0000.parquet",))
        assert found.part == "partial-train"


def test_several_configs_must_be_told_apart():
    hub = Hub(main=["name.py"], converted=["en/train/0.parquet", "fr/train/0.parquet"])
    with pytest.raises(CorpusUnavailable, match=r"en/train, fr/train.*--dataset-config"):
        find_repository(SOURCE, hub)
    assert find_repository(DatasetOptions("owner/name", config="fr"), hub).files == ("fr/train/0.parquet",)
