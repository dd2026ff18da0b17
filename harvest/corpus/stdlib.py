"""A corpus that every machine has: the text of the running Python's standard library.

Demos, tests and the pocket model therefore need no download. Files that builds generate, sites install or container
images drop are left out, so that the same Python gives the same text; if a distribution has patched a file after all,
`text_digest` differs. One file is one document, except `pydoc`'s language reference, whose topics in plain English are
documents of their own.
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from .source import SMALL_TOKENS, STDLIB, InOrder, Source

EXCLUDED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",  # generated tables of code points
        "ensurepip",  # bundles wheels, removed by distributions
        "idlelib",  # a separate package on many systems
        "lib-dynload",
        "site-packages",
        "test",  # left out of most container images
        "tests",
        "tkinter",
        "turtledemo",
    }
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "turtle", "sitecustomize", "usercustomize")
TOPICS_FILE = "pydoc_data/topics.py"
MIN_CHARACTERS = 64  # empty package markers are not documents


def stdlib_documents(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document, in the order of their names.

    `root` is the library folder; the running interpreter's by default.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    for name in sorted(_source_names(root)):
        text = _decode((root / name).read_bytes())
        if text is None:
            continue
        for document_name, document in _split(name, text):
            if len(document.strip()) >= MIN_CHARACTERS:
                yield document_name, document


def text_digest(documents: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over names and texts: equal digests mean the same corpus."""
    digest = hashlib.sha256()
    for name, text in documents:
        for part in (name, text):
            raw = part.encode("utf-8")
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def _source_names(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        # config-3.11-... is specific to a build
        folders[:] = [name for name in folders if name not in EXCLUDED_FOLDERS and not name.startswith("config-")]
        for file in files:
            if file.endswith(".py") and not file.startswith(EXCLUDED_PREFIXES):
                yield (Path(folder) / file).relative_to(root).as_posix()


def _decode(raw: bytes) -> str | None:
    """The text of a source file, by its declared encoding; None if it cannot be decoded."""
    if b"\0" in raw:
        return None
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding).replace("\r\n", "\n")
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None


def _split(name: str, text: str) -> Iterator[tuple[str, str]]:
    topics = _topics(text) if name == TOPICS_FILE else None
    if topics is None:
        yield name, text
        return
    for topic in sorted(topics):
        yield f"{name}:{topic}", topics[topic].strip() + "\n"


def _topics(text: str) -> dict[str, str] | None:
    """The dictionary that the file assigns to `topics`, read without running the file."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return None


class StdlibCorpus(InOrder):
    id = STDLIB
    settings: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    @cached_property
    def _documents(self) -> list[tuple[str, str]]:
        return list(stdlib_documents())

    @property
    def revision(self) -> str:
        return f"sha256:{text_digest(self._documents)}"

    def _texts(self) -> Iterator[str]:
        return (text for _, text in self._documents)


SOURCE = Source(
    help=STDLIB,
    takes=lambda options: options.dataset == STDLIB,
    open=lambda _: StdlibCorpus(),
    heeds=(),
    tokens=SMALL_TOKENS,
)
