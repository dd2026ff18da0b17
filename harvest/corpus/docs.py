"""A corpus of installed documentation, such as /usr/share/doc: HTML, text and its markups, plain or gzipped.

Each file is one document, HTML without its tags. Identical files count once. Files are read in the order of their
hashes, so that the first part of a large folder is a sample of all of it, and paths do not affect the text. Files that
are not UTF-8 or nearly empty are skipped, as are changelogs and licences, which are not documentation: the numbers of
skipped files are reported to the user.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from ...cache_schema.numbers_in_words import counted
from ..errors import CorpusEmpty, CorpusUnavailable
from .source import DatasetOptions, InOrder, Source, checked_text, names_under

PREFIX = "docs:"
HTML_SUFFIXES = (".html", ".htm")
SUFFIXES = (*HTML_SUFFIXES, ".txt", ".md", ".rst", ".adoc", ".pod")
NOT_DOCUMENTATION = ("changelog", "copyright", "license")
MIN_CHARACTERS = 200
LARGEST_BYTES = 8 << 20  # longer files are generated tables
READING = 1  # the version of the rules below, which decide the text
REMEDY = (
    f"To have text in them read, put it, as UTF-8, into .txt files of {MIN_CHARACTERS} characters to "
    f"{LARGEST_BYTES >> 20} MiB"
)


class DocsCorpus(InOrder):
    """The documents in a folder of documentation."""

    id = "docs"
    settings: dict[str, Any] = {"reading": READING}  # noqa: RUF012 (never changed)

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unfit: Counter[str] = Counter()  # counts of the `_files` skipped after reading, by reason

    @cached_property
    def _scan(self) -> tuple[dict[str, Path], Counter[str], str]:
        """Each distinct file once, by hash; counts of skipped files by reason; in words, folders not entered."""
        names, not_entered = names_under(self._folder)
        found: dict[str, Path] = {}
        others: Counter[str] = Counter()
        for file in sorted(names):
            if why := _why_not(file):
                others[why] += 1
            else:
                found.setdefault(_digest_of(file), file)
        return dict(sorted(found.items())), others, not_entered

    @property
    def _files(self) -> dict[str, Path]:
        if files := self._scan[0]:
            return files
        more = f"; {self.left_alone}" if self.left_alone else ""
        raise CorpusEmpty(f"{self._folder} holds no documentation ({', '.join(SUFFIXES)}, or these with .gz){more}")

    @property
    def left_alone(self) -> str:
        """In words: how many files are skipped, by reason."""
        _, others, not_entered = self._scan
        counts = others + self._unfit
        kinds = "; ".join(f"{count:,} {why}" for why, count in counts.most_common())
        report = f"{counted(counts.total(), 'file')} of {self._folder} left alone ({kinds}). {REMEDY}" if counts else ""
        return ". ".join(filter(None, (report, not_entered)))

    @property
    def revision(self) -> str:
        return f"sha256:{hashlib.sha256(''.join(self._files).encode()).hexdigest()}"

    def _texts(self) -> Iterator[str]:
        self._unfit.clear()
        for file in self._files.values():
            try:
                text = _text_of(file)
            except _Unfit as why:
                self._unfit[f"{why}"] += 1
            else:
                yield checked_text(text, f"{file}")


class _Unfit(Exception):
    """A file is skipped; the message is the reason."""


def _why_not(file: Path) -> str:
    """The reason why a file is not read; empty if it is."""
    plain = file.name.lower().removesuffix(".gz")
    if plain.startswith(NOT_DOCUMENTATION):
        return "changelogs, copyrights or licences"
    if not plain.endswith(SUFFIXES):
        return "with another suffix"
    if os.path.islink(file):
        return "that are links"
    return "" if os.access(file, os.R_OK) and file.is_file() else "that cannot be read"


def _digest_of(file: Path) -> str:
    """The hash of a file of any size: one that is too long to be read still counts in the revision."""
    kind = b"html:" if _is_html(file) else b"text:"
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.sha256(kind)).hexdigest()


def _is_html(file: Path) -> bool:
    return file.name.lower().removesuffix(".gz").endswith(HTML_SUFFIXES)


def _text_of(file: Path) -> str:
    """The visible text of a file."""
    try:
        with (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb") as opened:
            raw = opened.read(LARGEST_BYTES + 1)
        if len(raw) > LARGEST_BYTES:
            raise _Unfit(f"over {LARGEST_BYTES >> 20} MiB")
        text = raw.decode("utf-8")
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile):
        raise _Unfit("damaged or not UTF-8") from None
    if "\0" in text:
        raise _Unfit("damaged or not UTF-8")
    text = html_to_text(text) if _is_html(file) else text.replace("\r\n", "\n")
    if len(text) < MIN_CHARACTERS:
        raise _Unfit(f"under {MIN_CHARACTERS} characters")
    return text


class _Page(HTMLParser):
    """Collects the text of a page, with line breaks around blocks."""

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
            self._hidden = 0  # a head may be left unclosed
        if tag == "pre":
            self._pre = max(0, self._pre + step)
        if tag in ("td", "th"):
            self.parts.append(" ")
        elif tag not in self.INLINE:
            self.parts.append("\n")

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """Treat unknown sections as comments, as browsers and later Pythons do; earlier Pythons raise an error."""
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:
            return self.parse_bogus_comment(i, report)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data if self._pre else re.sub(r"\s+", " ", data))


def html_to_text(page: str) -> str:
    """The text of a page, without markup, scripts, styles and navigation."""
    parser = _Page()
    parser.feed(page)
    parser.close()
    lines = "".join(parser.parts).split("\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip() + "\n"


def open_docs(options: DatasetOptions) -> DocsCorpus:
    name = options.dataset.removeprefix(PREFIX)
    folder = Path(os.path.expanduser(name))
    if not name or not folder.is_dir():
        raise CorpusUnavailable(f"there is no folder {name!r}. Give --dataset {PREFIX}FOLDER, such as /usr/share/doc")
    return DocsCorpus(folder)


SOURCE = Source(
    help=f"{PREFIX}FOLDER of installed documentation",
    takes=lambda options: options.dataset.startswith(PREFIX),
    open=open_docs,
    heeds=(),
)
