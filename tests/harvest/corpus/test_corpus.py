"""Local files and the standard library as corpora: what a document is, identity, resuming, and bad input."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from saemill.harvest.corpus import local, open_corpus
from saemill.harvest.corpus.docs import DocsCorpus
from saemill.harvest.corpus.local import LocalCorpus
from saemill.harvest.corpus.source import DatasetOptions, left_alone_by
from saemill.harvest.corpus.stdlib import StdlibCorpus
from saemill.harvest.errors import CorpusEmpty, CorpusUnavailable, DocumentInvalid, SettingInvalid


def read(path: Path, column: str = "text") -> list[str]:
    return list(LocalCorpus(path, column).documents())


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_blank_lines_part_documents(tmp_path):
    assert read(write(tmp_path / "a.txt", "one\ntwo\n\n\nthree\n")) == ["one\ntwo\n", "three\n"]


def test_without_blank_lines_every_line_is_a_document(tmp_path):
    assert read(write(tmp_path / "a.txt", "\none\ntwo\nthree\n\n")) == ["one\n", "two\n", "three\n"]


def test_in_a_folder_each_text_file_is_a_document(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.txt", "one\n\ntwo")
    write(tmp_path / "sub" / "a.md", "three")
    write(tmp_path / "c.jsonl", '{"text": "four"}\n\n{"text": "five"}\n')
    write(tmp_path / "picture.png", b"\xff\xfe")
    assert read(tmp_path) == ["one\n\ntwo", "four", "five", "three"]


def test_who_goes_on_opens_no_file_that_was_read(tmp_path):
    """Of a million files on a shared disk that is a quarter of an hour."""
    for number in range(9):
        rows = "".join(f'{{"text": "{number} {row}"}}\n' for row in range(number % 4))
        write(tmp_path / f"{number}.{'jsonl' if number % 3 else 'txt'}", rows if number % 3 else f"text {number}")
    whole, corpus, states = read(tmp_path), LocalCorpus(tmp_path), list[dict[str, Any]]()
    for _ in corpus.documents():
        states.append(json.loads(json.dumps(corpus.state())))
    assert len(whole) == 10 and [state["documents"] for state in states] == list(range(1, 11))
    for state in states:
        again = LocalCorpus(tmp_path)
        assert list(again.documents(state)) == whole[state["documents"] :] and again.state()["documents"] == 10
        assert list(again.documents({"documents": state["documents"]})) == whole[state["documents"] :]
    for state, text in zip(states, whole, strict=True):
        for file in sorted(tmp_path.iterdir()):
            if text in file.read_text():
                break
            file.write_text("no JSON")
        assert list(LocalCorpus(tmp_path).documents(state)) == whole[state["documents"] :]


def test_rows_of_parquet(tmp_path):
    texts = [f"document {i}" for i in range(1000)]
    pq.write_table(pa.table({"body": texts, "n": range(1000)}), tmp_path / "a.parquet", row_group_size=100)
    assert read(tmp_path / "a.parquet", "body") == texts


def test_a_parquet_file_with_a_corrupt_page_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"document {i}" for i in range(1000)]}), path, use_dictionary=False)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(60) + content[len(content) // 2 + 60 :])
    with pytest.raises(CorpusUnavailable, match=r"a\.parquet cannot be read as parquet: .*[Cc]orrupt"):
        read(path)


def test_identity_is_of_the_bytes_and_not_of_the_path(tmp_path):
    one, two = write(tmp_path / "a.txt", "text"), write(tmp_path / "b.txt", "text")
    other = write(tmp_path / "c.txt", "texts")
    assert LocalCorpus(one).revision == LocalCorpus(two).revision != LocalCorpus(other).revision
    assert str(tmp_path) not in json.dumps([LocalCorpus(one).id, LocalCorpus(one).revision, LocalCorpus(one).settings])


def test_moving_text_between_files_changes_the_identity_of_a_folder(tmp_path):
    for name, parts in (("x", ("ab", "c")), ("y", ("a", "bc"))):
        (tmp_path / name).mkdir()
        for i, part in enumerate(parts):
            write(tmp_path / name / f"{i}.txt", part)
    assert LocalCorpus(tmp_path / "x").revision != LocalCorpus(tmp_path / "y").revision


def test_a_folder_of_text_and_rows_says_which_file_is_which(tmp_path):
    """The same bytes are other documents; folders of one kind have the identity they always had."""
    row = '{"text": "one"}\n'
    for name, suffix in (("rows", "jsonl"), ("mixed", "txt")):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"a.{suffix}", row)
        write(tmp_path / name / "b.jsonl", row)
    rows, mixed = LocalCorpus(tmp_path / "rows"), LocalCorpus(tmp_path / "mixed")
    assert list(rows.documents()) != list(mixed.documents())
    assert (rows.id, rows.settings) == (mixed.id, mixed.settings) and rows.revision != mixed.revision
    one = hashlib.sha256(row.encode()).digest()
    assert rows.revision == f"sha256:{hashlib.sha256(one + one).hexdigest()}"


@pytest.fixture
def hashed(tmp_path, monkeypatch) -> list[Path]:
    """The files that were read for a digest; every corpus is a large one, and clocks tick quickly."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(local, "LARGE_FILES", 1)
    monkeypatch.setattr(local, "TICK_SECONDS", 0.1)
    read, hash_files = list[Path](), LocalCorpus._hash_files

    def hash_and_count(corpus: LocalCorpus) -> str:
        read.extend(corpus.files)
        return hash_files(corpus)

    monkeypatch.setattr(LocalCorpus, "_hash_files", hash_and_count)
    return read


def test_a_large_corpus_is_read_for_its_digest_once_while_its_files_stay_as_they_are(tmp_path, hashed, monkeypatch):
    """Every worker asks for it at every start: that of 200 GB is minutes, of sixty workers on one disk hours."""
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    one, two = write(folder / "a.txt", "one"), write(folder / "sub" / "b.txt", "two")
    told = LocalCorpus(folder).to_hash
    assert told == f"reading 6 bytes of {folder}, 2 files, for the corpus's digest"
    first = LocalCorpus(folder).revision
    assert LocalCorpus(folder).revision == first and hashed == [one, two] and not LocalCorpus(folder).to_hash
    monkeypatch.chdir(tmp_path)
    assert LocalCorpus(Path("texts")).revision == first and len(hashed) == 2
    elsewhere = Path(shutil.copytree(folder, tmp_path / "elsewhere"))  # with its files' times
    assert LocalCorpus(elsewhere).revision == first and len(hashed) == 4
    for kept in (tmp_path / "home/saemill/corpora").iterdir():
        kept.write_text("sha256:0")  # as a disk that was full may leave it
    assert LocalCorpus(folder).revision == first and len(hashed) == 6
    monkeypatch.setattr(local, "LARGE_FILES", 3)
    shutil.rmtree(tmp_path / "home")
    assert LocalCorpus(folder).revision == first and not (tmp_path / "home").exists()


def test_text_that_changed_is_read_whatever_its_size_and_the_time_of_writing_say(tmp_path, hashed):
    path = write(tmp_path / "a.txt", "one")
    first, times = LocalCorpus(path).revision, (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    os.utime(write(path, "two"), ns=times)
    second = LocalCorpus(path).revision
    os.utime(write(tmp_path / "b.txt", "six"), ns=times)
    os.replace(tmp_path / "b.txt", path)
    assert len({first, second, LocalCorpus(path).revision}) == 3 == len(hashed)


def test_text_written_while_it_is_read_is_read_again(tmp_path, hashed, monkeypatch):
    """Also by a file system whose clock goes in seconds and is an hour slow."""
    path, tick = write(tmp_path / "a.txt", "one"), int(local.TICK_SECONDS * 1e9)

    def coarse(file: Path) -> Any:
        found = os.stat(file)
        times = {name: getattr(found, name) // tick * tick - 36 * 10**11 for name in ("st_mtime_ns", "st_ctime_ns")}
        return SimpleNamespace(st_size=found.st_size, st_ino=found.st_ino, **times)

    hash_files = LocalCorpus._hash_files

    def hash_and_write(corpus: LocalCorpus) -> str:
        digest = hash_files(corpus)
        write(path, "two")
        return digest

    monkeypatch.setattr(local, "os", SimpleNamespace(stat=coarse, path=os.path))
    while time.time_ns() % tick > tick // 10:
        time.sleep(0.001)
    write(path, "one")
    with monkeypatch.context() as patched:
        patched.setattr(LocalCorpus, "_hash_files", hash_and_write)
        first = LocalCorpus(path).revision
    assert (
        LocalCorpus(path).revision == f"sha256:{hashlib.sha256(hashlib.sha256(b'two').digest()).hexdigest()}" != first
    )


def test_the_standard_library_is_a_corpus():
    corpus = open_corpus(DatasetOptions("stdlib"))
    assert isinstance(corpus, StdlibCorpus)
    head = list(islice(corpus.documents(), 3))
    again = StdlibCorpus()
    assert next(again.documents(corpus.state())) == list(islice(again.documents(), 4))[3]
    assert len(set(head)) == 3
    assert corpus.revision == again.revision


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("a.txt", b"fine\n\nbad \xff\xfe byte\n", DocumentInvalid, r"line 3: byte 0xff at 4 .* UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', DocumentInvalid, "line 2: byte 0xff"),
        ("a.jsonl", '{"text": "half \\ud800 pair"}', DocumentInvalid, "line 1: .* character 5"),
        ("a.jsonl", "{", DocumentInvalid, "line 1 is not JSON"),
        ("a.jsonl", '{"body": "x"}', DocumentInvalid, "expected an object with 'text', found body"),
        ("a.jsonl", "[1]", DocumentInvalid, "expected an object with 'text', found list"),
        ("a.jsonl", '{"text": 7}', DocumentInvalid, "expected text, found int"),
        ("a.parquet", b"no parquet", CorpusUnavailable, "cannot be read as parquet"),
    ],
)
def test_bad_documents_are_named(tmp_path, name, content, error, words):
    with pytest.raises(error, match=words):
        read(write(tmp_path / name, content))


def test_a_blank_line_among_lines_that_are_documents_makes_no_giant(tmp_path, monkeypatch):
    """Two documents of 100 MB, where there were 400,000, would take twelve gigabytes each in the tokenizer."""
    monkeypatch.setattr(local, "LARGEST_BYTES", 400)
    lines = [f"document {number:03}\n" for number in range(100)]
    path = write(tmp_path / "a.txt", "".join(lines))
    assert read(path) == lines
    write(path, "".join(["one\n\n", *lines]))
    with pytest.raises(DocumentInvalid, match=r"a\.txt, line 3: expected documents of at most 400 bytes.* Blank lines"):
        read(path)
    write(path, f"one\ntwo\n{'x' * 401}")
    with pytest.raises(DocumentInvalid, match="line 3: "):
        read(path)
    with pytest.raises(DocumentInvalid, match=r"a\.txt: .* In a folder each text file is one"):
        read(tmp_path)
    write(path, "".join(f"{block * 399}\n\n" for block in "abc"))
    assert [len(text) for text in read(path)] == [400] * 3


def test_invalid_bytes_in_parquet_are_named(tmp_path):
    raw = pa.array([b"fine", b"bad \xff"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(DocumentInvalid, match="row 1: byte 0xff at 4"):
        read(tmp_path / "a.parquet")


def test_a_missing_column_of_parquet_lists_what_there_is(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusUnavailable, match="no column 'text'; it has body, n"):
        read(tmp_path / "a.parquet")


def test_a_folder_without_text_is_empty(tmp_path):
    write(tmp_path / "a.bin", b"x")
    with pytest.raises(CorpusEmpty, match="no file with text"):
        read(tmp_path)


def test_files_of_a_folder_that_are_not_read_are_counted(tmp_path):
    """Of a folder of packed text, or of pages, and one README the README alone would be the corpus."""
    for name in ("a.jsonl.gz", "deep/b.TXT.GZ", "c.json", "page.html", "NOTICE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "text")
    said = f"5 files of {tmp_path} left alone (2 .gz, 1 without suffix, 1 .json, 1 .html). To have one read: If it"
    with pytest.raises(CorpusEmpty, match=re.escape("holds no file with text (.txt, .md") + ".*" + re.escape(said)):
        read(tmp_path)
    write(tmp_path / "README.md", "text")
    assert read(tmp_path) == ["text"]
    told = left_alone_by(LocalCorpus(tmp_path))
    assert told.startswith(said) and "Unpack it first. Write its rows into" in told
    for number in range(9):
        write(tmp_path / f"log.{number}", "text")
    assert "14 files of" in left_alone_by(LocalCorpus(tmp_path)) and ", and others)" in left_alone_by(
        LocalCorpus(tmp_path)
    )
    assert left_alone_by(LocalCorpus(tmp_path / "README.md")) == left_alone_by(StdlibCorpus()) == ""


def test_names_of_a_folder_that_lead_to_no_file_are_counted(tmp_path):
    """Links into a disk that is not mounted may be most of a corpus."""
    write(tmp_path / "b.txt", "text")
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone/a.txt")
    os.mkfifo(tmp_path / "c.txt")
    (tmp_path / "books").symlink_to(tmp_path / "gone")  # a folder, most likely
    for name in (".#b.txt", "d.png"):  # what would not be read either, or is an editor's
        (tmp_path / name).symlink_to(tmp_path / "gone")
    assert read(tmp_path) == ["text"]
    said = f"3 names of {tmp_path} left alone (broken links, pipes and the like): {tmp_path}/a.txt, "
    said += f"{tmp_path}/books, {tmp_path}/c.txt. To have one read: put a file in its place"
    assert left_alone_by(LocalCorpus(tmp_path)) == said
    (tmp_path / "b.txt").unlink()
    with pytest.raises(CorpusEmpty, match="3 names of .* left alone"):
        read(tmp_path)


def test_hidden_files_are_read_as_they_always_were_and_told(tmp_path):
    """Half-written notebooks and what git keeps: nobody means these, and stores were begun with them."""
    for name in ("a.md", ".ipynb_checkpoints/a.md", ".git/x.txt", ".git/objects/b3", ".note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        write(tmp_path / name, f"text of {name}")
    corpus = LocalCorpus(tmp_path)
    texts = [f"text of {name}" for name in (".git/x.txt", ".ipynb_checkpoints/a.md", ".note.txt", "a.md")]
    assert list(corpus.documents()) == texts
    digests = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
    assert corpus.revision == f"sha256:{hashlib.sha256(digests).hexdigest()}"
    assert left_alone_by(corpus) == (
        f"3 hidden files of {tmp_path} read as text (.git/x.txt, .ipynb_checkpoints/a.md, .note.txt). Move unintended "
        "files out of the folder"
    )


@pytest.mark.parametrize("open_it", [LocalCorpus, DocsCorpus])
@pytest.mark.parametrize("number", [None, errno.EACCES, errno.EIO])
def test_folders_that_are_not_entered_are_told(tmp_path, monkeypatch, open_it, number):
    """What lies behind a link, or is another user's, may be most of a corpus. A disk that is lost ends the search."""
    here, scandir = tmp_path / "here", os.scandir
    for folder in (tmp_path / "elsewhere", here / "mine", here / "theirs"):
        folder.mkdir(parents=True)
        write(folder / "a.txt", folder.name * 99)
    (here / "link").symlink_to(tmp_path / "elsewhere")

    def listed(path):
        if number and Path(path).name == "theirs":
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listed)
    corpus = open_it(here)
    if number == errno.EIO:
        with pytest.raises(OSError, match="theirs"):
            list(corpus.documents())
        return
    entered = ["mine"] if number else ["mine", "theirs"]
    assert sorted(corpus.documents()) == [name * 99 for name in entered]
    closed = f"2 folders not entered (links, or without permission): {here}/link, {here}/theirs. To have one read"
    assert left_alone_by(corpus).startswith(
        closed if number else closed.replace("2 folders", "1 folder").replace(f", {here}/theirs", "")
    )


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("wiki.json", "rename it"), ("a.CSV", ".jsonl"), ("x.jsonl.gz", "Unpack it"), ("x.txt.zst", "Unpack it")],
)
def test_a_file_of_rows_or_a_packed_one_is_not_read_as_text(tmp_path, name, remedy):
    path = write(tmp_path / name, '{"text": "one"}\n{"text": "two"}\n')
    suffix = Path(name).suffix
    with pytest.raises(CorpusUnavailable, match=rf"expected text .* \.parquet, found \{suffix}\. .*{remedy}"):
        open_corpus(DatasetOptions(str(path)))


@pytest.mark.parametrize("name", ["enwik", "wiki.train.tokens", "notes.rst", "a.txt"])
def test_any_other_file_is_text_and_has_no_columns(tmp_path, name):
    path = write(tmp_path / name, "one\n\ntwo\n")
    assert list(open_corpus(DatasetOptions(str(path))).documents()) == ["one\n", "two\n"]
    with pytest.raises(SettingInvalid, match=f"--column body: .*{name} is plain text"):
        open_corpus(DatasetOptions(str(path), column="body"))


@pytest.mark.parametrize("name", ["./nothing", "nothing.txt", "/no/such/folder", "a/b/c"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(CorpusUnavailable, match="no file or folder"):
        open_corpus(DatasetOptions(name))
