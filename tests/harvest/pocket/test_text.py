"""The standard library as a corpus: the same documents everywhere, and only text."""

from pathlib import Path

import pytest

from saemill.harvest.corpus.stdlib import stdlib_documents, text_digest

BODY = "# a line that is long enough to count as a document of its own, and then some\n"


@pytest.fixture
def library(tmp_path: Path) -> Path:
    files = {
        "zebra.py": BODY.encode(),
        "abc/inner.py": BODY.replace("\n", "\r\n").encode(),
        "latin.py": b"# -*- coding: latin-1 -*-\n" + BODY.encode() + "# café\n".encode("latin-1"),
        "invalid.py": BODY.encode() + b"\xff\xfe\n",
        "unknown_codec.py": b"# -*- coding: martian -*-\n" + BODY.encode(),
        "binary.py": BODY.encode() + b"\0",
        "empty.py": b"",
        "test/regression.py": BODY.encode(),
        "json/tests/case.py": BODY.encode(),
        "site-packages/other.py": BODY.encode(),
        "config-3.11-x86_64-linux-gnu/python-config.py": BODY.encode(),
        "_sysconfigdata__linux_x86_64-linux-gnu.py": BODY.encode(),
        "notes.txt": BODY.encode(),
        "pydoc_data/topics.py": f"topics = {{'b': {BODY!r}, 'a': 'The {BODY.strip()}'}}\n".encode(),
    }
    for name, raw in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    return tmp_path


def test_keeps_source_text_in_order_and_nothing_else(library: Path) -> None:
    names = [name for name, _ in stdlib_documents(library)]
    assert names == ["abc/inner.py", "latin.py", "pydoc_data/topics.py:a", "pydoc_data/topics.py:b", "zebra.py"]


def test_decodes_as_the_interpreter_does(library: Path) -> None:
    documents = dict(stdlib_documents(library))
    assert documents["latin.py"].endswith("# café\n")
    assert documents["abc/inner.py"] == BODY


def test_topics_are_documents_of_plain_text(library: Path) -> None:
    documents = dict(stdlib_documents(library))
    assert documents["pydoc_data/topics.py:a"] == f"The {BODY}"


def test_the_real_library_is_large_sorted_and_has_no_name_twice() -> None:
    documents = list(stdlib_documents())
    names = [name for name, _ in documents]
    assert len(set(names)) == len(names)
    assert [n.split(":")[0] for n in names] == sorted(n.split(":")[0] for n in names)
    assert sum(len(text) for _, text in documents) > 5_000_000
    assert not [name for name in names if "site-packages" in name or "/test/" in name]


def test_reading_twice_gives_the_same_digest() -> None:
    assert text_digest(stdlib_documents()) == text_digest(stdlib_documents())


def test_digest_sees_texts_names_and_borders() -> None:
    digests = {
        text_digest(documents)
        for documents in (
            [("a", "bc")],
            [("ab", "c")],
            [("a", "bd")],
            [("a", "b"), ("c", "")],
            [("a", "bc"), ("a", "bc")],
        )
    }
    assert len(digests) == 5
