"""A corpus of installed documentation, such as /usr/share/doc: HTML, text and its markups, plain or gzipped.

Each file is one document, HTML without its tags. Equal files count once. They come in the order of their hashes, so
that the first part of a large folder is a sample of all of it, and no path decides the text. What is not UTF-8, or
nearly empty, is passed over; logs of changes and licences are not documentation.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from ..errors import CorpusEmpty, CorpusUnavailable
from .source import DatasetOptions, InOrder, Source, checked_text

PREFIX = "docs:"
HTML_SUFFIXES = (".html", ".htm")
SUFFIXES = (*HTML_SUFFIXES, ".txt", ".md", ".rst", ".adoc", ".pod")
NO_DOCUMENTATION = ("changelog", "copyright", "license")
MIN_CHARACTERS = 200
LARGEST_BYTES = 8 << 20  # what is longer is a table that somebody generated
READING = 1  # of the rules below: others would be another text


class DocsCorpus(InOrder):
    """Documents of a folder of documentation."""

    id = "docs"
    settings: dict[str, Any] = {"reading": READING}  # noqa: RUF012 (never changed)

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Each different file once, by its hash."""
        found: dict[str, Path] = {}
        for file in sorted(_documentation_in(self._folder)):
            found.setdefault(_digest_of(file), file)
        if not found:
            raise CorpusEmpty(f"{self._folder} holds no documentation ({', '.join(SUFFIXES)}, or these with .gz)")
        return dict(sorted(found.items()))

    @property
    def revision(self) -> str:
        return f"sha256:{hashlib.sha256(''.join(self._files).encode()).hexdigest()}"

    def _texts(self) -> Iterator[str]:
        for file in self._files.values():
            text = _text_of(file)
            if text is not None and len(text) >= MIN_CHARACTERS:
                yield checked_text(text, f"{file}")


def _documentation_in(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place, name)
            plain = name.lower().removesuffix(".gz")
            is_wanted = plain.endswith(SUFFIXES) and not plain.startswith(NO_DOCUMENTATION)
            if is_wanted and not file.is_symlink() and os.access(file, os.R_OK) and file.is_file():
                yield file


def _digest_of(file: Path) -> str:
    """Of any size: one that is too long to be text still counts in the revision."""
    kind = b"html:" if _is_html(file) else b"text:"
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.sha256(kind)).hexdigest()


def _is_html(file: Path) -> bool:
    return file.name.lower().removesuffix(".gz").endswith(HTML_SUFFIXES)


def _text_of(file: Path) -> str | None:
    """What a reader sees of a file; None where that cannot be known."""
    try:
        with (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb") as opened:
            raw = opened.read(LARGEST_BYTES + 1)
        text = raw.decode("utf-8")
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile):
        return None
    if len(raw) > LARGEST_BYTES or "\0" in text:
        return None
    return html_to_text(text) if _is_html(file) else text.replace("\r\n", "\n")


class _Page(HTMLParser):
    """The words of a page, with line breaks where its blocks end."""

    HIDDEN = frozenset({"head", "script", "style", "nav", "svg", "template", "noscript"})
    INLINE = frozenset(
        {"a", "abbr", "b", "bdi", "code", "em", "font", "i", "kbd", "samp", "small", "span", "strong", "sub"}
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._count(tag, 1)

    def handle_endtag(self, tag: str) -> None:
        self._count(tag, -1)

    def _count(self, tag: str, step: int) -> None:
        if tag in self.HIDDEN:
            self._hidden = max(0, self._hidden + step)
        if tag == "body":
            self._hidden = 0  # a head need not be closed
        if tag == "pre":
            self._pre = max(0, self._pre + step)
        if tag in ("td", "th"):
            self.parts.append(" ")
        elif tag not in self.INLINE:
            self.parts.append("\n")

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """Of an unknown name a comment, to browsers and to later Pythons; earlier ones end in an error of their own."""
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:
            return self.parse_bogus_comment(i, report)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data if self._pre else re.sub(r"\s+", " ", data))


def html_to_text(page: str) -> str:
    """The text of a page: markup, scripts, styles and navigation left out."""
    parser = _Page()
    parser.feed(page)
    parser.close()
    lines = "".join(parser.parts).split("\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip() + "\n"


def open_docs(options: DatasetOptions) -> DocsCorpus:
    name = options.dataset.removeprefix(PREFIX)
    folder = Path(os.path.expanduser(name))
    if not name or not folder.is_dir():
        raise CorpusUnavailable(f"there is no folder {name!r}: give --dataset {PREFIX}FOLDER, /usr/share/doc say")
    return DocsCorpus(folder)


SOURCE = Source(
    help=f"{PREFIX}FOLDER of installed documentation",
    takes=lambda options: options.dataset.startswith(PREFIX),
    open=open_docs,
    heeds=(),
)
