"""A folder of documentation as a corpus: what is read of it, in which order, and what of a page is text."""

from __future__ import annotations

import gzip
import hashlib
import os
import tracemalloc
from pathlib import Path

import pytest

from saemill.harvest.corpus.docs import LARGEST_BYTES, DocsCorpus, html_to_text
from saemill.harvest.errors import CorpusEmpty

LONG = "Some words about a command that one may read. " * 10

PAGE = """<!DOCTYPE html><html><head><title>no</title><style>p { x: y }</style></head>
<body><script>if (a < b) alert("no")</script><nav>no <a href=x>no</a></nav>
<h1>Ranges &amp; steps</h1><p>One   <b>two</b>
three.<pre>a =  1
  b</pre><table><tr><td>x</td><td>y</td></tr></table>"""


def test_a_page_is_its_words_in_the_lines_of_its_blocks():
    assert html_to_text(PAGE).split("\n") == [
        "Ranges & steps", "", "One two three.", "a =  1", "  b", "", " x  y", "",
    ]  # fmt: skip


def test_a_body_is_read_though_its_head_never_ends():
    assert html_to_text("<head><title>no</title><body>words") == "words\n"


@pytest.mark.parametrize("odd", ["<![word]>", "<![ CDATA[x]>", "<![if !IE]>", "<!>", "<!word>"])
def test_markup_that_is_in_no_standard_ends_nothing(odd):
    assert html_to_text(f"<p>one {odd}two") == "one two\n"


def test_each_text_is_read_once_and_what_is_no_documentation_not_at_all(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/one.txt", "a/b/same.txt"):
        (tmp_path / name).write_text(LONG + "one")
    (tmp_path / "a" / "two.md.gz").write_bytes(gzip.compress((LONG + "two").encode()))
    (tmp_path / "a" / "three.html").write_text(f"<p>{LONG}three")
    (tmp_path / "changelog.txt").write_text(LONG)
    (tmp_path / "latin.txt").write_bytes((LONG + "é").encode("latin-1"))
    (tmp_path / "broken.txt.gz").write_bytes(gzip.compress(LONG.encode())[:-9])
    (tmp_path / "short.rst").write_text("short")
    (tmp_path / "program.py").write_text(LONG)
    (tmp_path / "link.txt").symlink_to("/etc/hostname")
    texts = list(DocsCorpus(tmp_path).documents())
    assert sorted(text.split()[-1].removeprefix("read.") for text in texts) == ["one", "three", "two"]


def test_what_is_passed_over_is_counted_by_why_and_changes_no_identity(tmp_path: Path):
    (tmp_path / "read.txt").write_text(LONG)
    (tmp_path / "again.txt").write_text(LONG)
    plain = DocsCorpus(tmp_path)
    assert list(plain.documents()) == [LONG] and plain.left_alone == ""
    for name in ("a.py", "b.PDF", "no_suffix", "changelog.gz", "Copyright"):
        (tmp_path / name).write_text(LONG)
    (tmp_path / "link.txt").symlink_to(tmp_path / "read.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    unread = "3 with another suffix; 2 changelogs, copyrights or licences; 1 that are links; 1 that cannot be read"
    assert DocsCorpus(tmp_path).revision == plain.revision
    assert f"7 files of {tmp_path} left alone ({unread}). To have text" in DocsCorpus(tmp_path).left_alone
    for name in ("1.txt", "2.md", "3.rst", "4.html"):
        (tmp_path / name).write_text(f"short {name}")
    (tmp_path / "latin.txt").write_bytes((LONG + "é").encode("latin-1"))
    (tmp_path / "broken.txt.gz").write_bytes(gzip.compress(LONG.encode())[:-9])
    (tmp_path / "nul.txt").write_text(LONG + "\0")
    (tmp_path / "large.txt.gz").write_bytes(gzip.compress("é".encode() * LARGEST_BYTES))
    found = DocsCorpus(tmp_path)
    assert f"({unread})" in found.left_alone
    for _ in range(2):  # reading again counts nothing twice
        assert list(found.documents()) == [LONG]
        for kind in ("15 files of", "4 under 200 characters", "3 damaged or not UTF-8", "1 over 8 MiB"):
            assert kind in found.left_alone
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.py").write_text(LONG)
    with pytest.raises(CorpusEmpty, match=r"no documentation .*; 1 file of .* left alone \(1 with another suffix\)"):
        list(DocsCorpus(tmp_path / "none").documents())


def test_the_text_does_not_depend_on_where_files_lie(tmp_path: Path):
    for number in range(9):
        for side in ("here", "there"):
            folder = tmp_path / side / str(number % 2 if side == "here" else number)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number if side == 'here' else 9 - number}.txt").write_text(f"{LONG}{number}")
    here, there = DocsCorpus(tmp_path / "here"), DocsCorpus(tmp_path / "there")
    assert list(here.documents()) == list(there.documents())
    assert here.revision == there.revision
    (tmp_path / "there" / "3" / "6.txt").write_text(LONG)
    assert DocsCorpus(tmp_path / "there").revision != here.revision


def test_a_file_of_any_size_is_hashed_in_blocks(tmp_path: Path):
    (tmp_path / "long.txt").write_bytes(b"x" * (2 * LARGEST_BYTES))
    hashes = hashlib.sha256(b"text:" + b"x" * (2 * LARGEST_BYTES)).hexdigest()
    tracemalloc.start()
    try:
        assert DocsCorpus(tmp_path).revision == f"sha256:{hashlib.sha256(hashes.encode()).hexdigest()}"
        assert tracemalloc.get_traced_memory()[1] < LARGEST_BYTES
    finally:
        tracemalloc.stop()
