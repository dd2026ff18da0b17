"""What every file in harvest/corpus/ must do. A new source is found by its file; here it needs an example of itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub.errors import RepositoryNotFoundError

from saemill.harvest import corpus
from saemill.harvest.cli import main
from saemill.harvest.corpus import hugging_face, open_corpus, source_of, sources, stdlib
from saemill.harvest.corpus.hugging_face import Repository
from saemill.harvest.corpus.source import DatasetOptions
from saemill.harvest.errors import CorpusEmpty, CorpusUnavailable, DocumentInvalid, HarvestError, SourceInvalid

TEXTS = [f"document {number}, with words" for number in range(12)]
OTHERS = [*TEXTS[:-1], "document 11, with woods"]  # as many and as long
HALF = '{"text": "half \\ud800 pair"}\n'


def a_file(folder, monkeypatch, texts):
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DatasetOptions(str(folder / "a.jsonl"))


def a_folder_of_documentation(folder, monkeypatch, texts):
    for number, text in enumerate(texts):
        (folder / f"{number}.html").write_text(f"<title>x</title><p>{text} {'of a page ' * 30}")
    return DatasetOptions(f"docs:{folder}")


def a_folder_without_documentation(folder, monkeypatch):
    (folder / "changelog.txt").write_text("said " * 100)
    return DatasetOptions(f"docs:{folder}")


def a_data_set(folder, monkeypatch, texts):
    """Of a hub that lies in a folder, and has a commit for each content."""
    commit = hashlib.sha256("".join(texts).encode()).hexdigest()
    pq.write_table(pa.table({"text": texts}), folder / f"{commit}.parquet")
    files = {"train": str(folder / f"{commit}.parquet")}
    monkeypatch.setattr(hugging_face, "find_repository", lambda options: Repository(options.dataset, commit))
    monkeypatch.setattr(
        hugging_face, "_load", lambda *_: load_dataset("parquet", data_files=files, split="train", streaming=True)
    )
    return DatasetOptions("owner/name")


def a_library(folder, monkeypatch, texts):
    """One of few files in place of the running Python's."""
    for number, text in enumerate(texts):
        (folder / f"module_{number}.py").write_text(f'"""{text}"""\n' * 3)
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda _: str(folder))
    return DatasetOptions("stdlib")


def a_file_that_is_not_text(folder, monkeypatch):
    (folder / "bad.jsonl").write_text(HALF)
    return DatasetOptions(str(folder / "bad.jsonl"))


def a_data_set_that_is_not_there(folder, monkeypatch):
    def refuse(options):
        raise RepositoryNotFoundError("refused", response=SimpleNamespace(headers={}, request=None))  # pyright: ignore

    monkeypatch.setattr(hugging_face, "find_repository", refuse)
    return DatasetOptions("owner/nothing")


EXAMPLES = {  # the options of a corpus that these texts are written to
    "stdlib": a_library,
    "local": a_file,
    "docs": a_folder_of_documentation,
    "hugging_face": a_data_set,
}
BAD = {  # what to refuse, by which error; stdlib can be asked for nothing else
    "local": [
        (lambda *_: DatasetOptions("./nothing.txt"), CorpusUnavailable, "no file or folder './nothing.txt'"),
        (lambda *_: DatasetOptions("~nosuchuser/x"), CorpusUnavailable, "no file or folder '~nosuchuser/x'"),
        (lambda *_: DatasetOptions(""), CorpusUnavailable, "no file or folder ''"),
        (a_file_that_is_not_text, DocumentInvalid, "line 1: .* unpaired surrogate"),
    ],
    "docs": [
        (lambda *_: DatasetOptions("docs:./nothing"), CorpusUnavailable, "no folder './nothing'. Give --dataset docs:"),
        (lambda *_: DatasetOptions("docs:~nosuchuser"), CorpusUnavailable, "no folder '~nosuchuser'"),
        (lambda *_: DatasetOptions("docs:"), CorpusUnavailable, "no folder ''"),
        (a_folder_without_documentation, CorpusEmpty, r"no documentation \(\.html"),
    ],
    "hugging_face": [(a_data_set_that_is_not_there, CorpusUnavailable, "check the id and the revision")],
    "stdlib": [],
}
EACH = pytest.mark.parametrize("name", sources())


@pytest.fixture
def options(name, tmp_path, monkeypatch):
    assert name in EXAMPLES, f"add an example of harvest/corpus/{name}.py to EXAMPLES"
    return EXAMPLES[name](tmp_path, monkeypatch, TEXTS)


@EACH
def test_it_is_found_by_what_a_user_says(name, options):
    assert source_of(options) is sources()[name]


@EACH
def test_its_help_is_the_commands_help(name):
    option = next(parameter for parameter in main.params if parameter.name == "dataset")
    assert sources()[name].help in option.help


@EACH
def test_documents_are_the_same_each_time(name, options):
    found = open_corpus(options)
    first = list(islice(found.documents(), 20))
    assert first and all(isinstance(text, str) and text.encode() for text in first)
    assert list(islice(found.documents(), 20)) == first == list(islice(open_corpus(options).documents(), 20))


@EACH
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_it_goes_on_from_its_state(name, options, stop):
    found = open_corpus(options)
    whole, documents = list(islice(found.documents(), 10)), found.documents()
    head = list(islice(documents, stop))
    state = json.loads(json.dumps(found.state()))
    rest = open_corpus(options).documents(state if stop else None)
    assert head + list(islice(rest, 10 - stop)) == whole


@EACH
def test_what_was_begun_is_the_same_text_where_it_is_opened_again(name, options):
    """That only a remote corpus needs; and where another is asked for, it is not what was begun."""
    found, open_again = open_corpus(options), sources()[name].open_again
    whole = list(islice(found.documents(), 10))
    list(islice(found.documents(), 3))
    state = json.loads(json.dumps(found.state()))
    again = open_again(options, state)
    assert (again is None) == (sources()[name].pinned is None)
    if again is not None:
        assert list(islice(again.documents(state), 7)) == whole[3:]
        for attribute in ("id", "revision", "settings", "part"):
            assert getattr(again, attribute) == getattr(found, attribute)
        list(islice(found.documents(), 10))
        assert again.state() == found.state()
    assert open_again(options, {}) is open_again(replace(options, column="body"), found.state()) is None


@EACH
def test_it_describes_itself_for_the_manifest(name, options, tmp_path):
    """As plain JSON, the same each time, without a path; a remote one without being asked for."""
    found, again = open_corpus(options), open_corpus(options)
    told = [found.id, found.revision, found.settings]
    assert json.loads(json.dumps(told)) == told == [again.id, again.revision, again.settings]
    assert found.id and found.revision and str(tmp_path) not in json.dumps(told)
    pinned = sources()[name].pinned
    assert pinned is None or (pinned(options), found.id) == (found.settings, options.dataset)


@EACH
def test_another_text_has_another_revision(name, options, tmp_path, monkeypatch):
    """Even if only a letter differs: else a harvest would go on with the text of another store."""
    before = open_corpus(options)
    text, revision = list(before.documents()), before.revision
    assert EXAMPLES[name](tmp_path, monkeypatch, OTHERS) == options
    after = open_corpus(options)
    assert list(after.documents()) != text, f"the example of harvest/corpus/{name}.py does not write its texts"
    assert after.revision != revision


@EACH
def test_bad_input_is_a_named_error_that_says_what_to_do(name, tmp_path, monkeypatch):
    assert name in BAD, f"add to BAD what harvest/corpus/{name}.py refuses"
    for make, error, words in BAD[name]:
        with pytest.raises(error, match=words) as raised:
            list(open_corpus(make(tmp_path, monkeypatch)).documents())
        assert isinstance(raised.value, HarvestError)


def test_a_file_that_declares_nothing_is_refused(tmp_path, monkeypatch):
    (tmp_path / "empty_one.py").write_text('"""Nothing."""\n')
    monkeypatch.setattr(corpus, "__path__", [*corpus.__path__, str(tmp_path)])
    sources.cache_clear()
    with pytest.raises(SourceInvalid, match=r"empty_one\.py: expected SOURCE = Source"):
        sources()
