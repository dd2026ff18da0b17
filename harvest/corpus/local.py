"""A corpus of local files: text, jsonl, parquet, or a folder of any of these.

A single text file, whatever its suffix, holds documents separated by blank lines or, without blank lines, one document
per line; suffixes of compressed files and of other row formats are refused. In a folder each text file is one document.
jsonl and parquet files hold one document per row. A folder's files are read in the order of their names, hidden ones
included, because existing stores were made with them; files of other kinds are skipped. Hidden and skipped files are
reported to the user.

The identity is a hash of the bytes, never the path. A large corpus's hash is cached with the user's models, under a
hash of its files' paths, sizes, inodes and times, so that not every worker reads all of it at every start.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ...cache_schema.numbers_in_words import counted, say_size, some_of
from ..errors import CorpusEmpty, CorpusUnavailable, DocumentInvalid, SettingInvalid
from .source import OPENWEBTEXT, STDLIB, DatasetOptions, InOrder, Source, State, cell_text, names_under

TEXT_SUFFIXES = (".txt", ".md", ".text")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
FILE_SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, *PARQUET_SUFFIXES)
ROWS_REMEDY = (
    "Write its rows into a .jsonl file, one JSON object per line; if it has such lines already, just rename it"
)
NO_TEXT: dict[str, str] = {
    **dict.fromkeys((".json", ".csv", ".tsv"), ROWS_REMEDY),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"), "Unpack it first"),
}
NAME_REMEDY = f"If it holds text, rename it to one of {', '.join(TEXT_SUFFIXES)}"
PARQUET_ROWS = 256
LARGE_BYTES, LARGE_FILES = 1 << 30, 10_000  # from either on, a corpus's digest is cached
TICK_SECONDS = 2.0  # the coarsest resolution of any file system's times
LARGEST_BYTES = 64_000_000  # of a plain text document: the tokenizer needs over a hundred bytes of memory for each


class LocalCorpus(InOrder):
    """The documents of a file, or of all files under a folder."""

    id = "local"

    def __init__(self, path: Path, column: str = "text") -> None:
        self._path = path
        self._column = column
        self._file = 0  # the current file; `_before` counts the documents in earlier ones

    @cached_property
    def files(self) -> list[Path]:
        if self._path.is_file():
            return [self._path]
        files = [file for file in self._scan[0] if _is_read(file)]
        if not files:
            more = f"; {self.left_alone}" if self.left_alone else ""
            raise CorpusEmpty(f"{self._path} holds no file with text ({', '.join(FILE_SUFFIXES)}){more}")
        return files

    @cached_property
    def left_alone(self) -> str:
        """In words: the folder's files that are not read, hidden ones that are, and the remedy."""
        if self._path.is_file():
            return ""
        files, no_files, not_entered = self._scan
        is_hidden = {file: any(part.startswith(".") for part in file.relative_to(self._path).parts) for file in files}
        others = Counter(file.suffix.lower() for file in files if not is_hidden[file] and not _is_read(file))
        hidden = [file for file in files if is_hidden[file]]
        reports = self._say_others(others), self._say_no_files(no_files), not_entered, self._say_hidden(hidden)
        return ". ".join(filter(None, reports))

    def _say_others(self, suffixes: Counter[str]) -> str:
        if not suffixes:
            return ""
        kinds = some_of([f"{count:,} {suffix or 'without suffix'}" for suffix, count in suffixes.most_common()])
        remedies = ". ".join(dict.fromkeys(NO_TEXT.get(suffix, NAME_REMEDY) for suffix in sorted(suffixes)))
        return f"{counted(suffixes.total(), 'file')} of {self._path} left alone ({kinds}). To have one read: {remedies}"

    def _say_no_files(self, names: Sequence[Path]) -> str:
        count = f"{counted(len(names), 'name')} of {self._path} left alone (broken links, pipes and the like)"
        return f"{count}: {some_of(list(map(str, names)))}. To have one read: put a file in its place" if names else ""

    def _say_hidden(self, files: Iterable[Path]) -> str:
        names = [f"{file.relative_to(self._path)}" for file in files if _is_read(file)]
        count = f"{counted(len(names), 'hidden file')} of {self._path} read as text ({some_of(names)})"
        return f"{count}. Move unintended files out of the folder" if names else ""

    @cached_property
    def _scan(self) -> tuple[list[Path], list[Path], str]:
        """Files under a folder, and names without a file that look like text or folders, both in order; in words, the
        folders that were not entered."""
        names, not_entered = names_under(self._path)
        names.sort(key=lambda name: name.relative_to(self._path).as_posix())
        files, no_files = list[Path](), list[Path]()
        for name in names:
            if name.is_file():
                files.append(name)
            elif (_is_read(name) or not name.suffix) and not name.name.startswith(".#"):  # not Emacs' lock links
                no_files.append(name)
        return files, no_files, not_entered

    @property
    def revision(self) -> str:
        return self._digest

    @property
    def to_hash(self) -> str:
        """In words: the reading needed for the revision, if that takes long; else empty."""
        if not self._is_large or self._cached_digest():
            return ""
        _, size = self._stamp
        return f"reading {say_size(size)} of {self._path}, {counted(len(self.files), 'file')}, for the corpus's digest"

    @cached_property
    def _digest(self) -> str:
        """The hash of all files, cached for a large corpus.

        Reading starts one tick of the file system's clock after the stamp was taken, so that any write that it may have
        missed, wholly or in part, changes the stamp. No clock but this process's own is needed.
        """
        if not self._is_large:
            return self._hash_files()
        if cached := self._cached_digest():
            return cached
        time.sleep(TICK_SECONDS)
        digest = self._hash_files()
        with suppress(OSError):  # a full disk or an unwritable home: computed again next time
            self._cache_file.parent.mkdir(parents=True, exist_ok=True)
            self._cache_file.write_text(digest, encoding="utf-8")
        return digest

    @cached_property
    def _stamp(self) -> tuple[str, int]:
        """A hash that changes with any file (its ctime cannot be set by programs), and the total size."""
        total, size = hashlib.sha256(), 0
        for file in self.files:
            stat = os.stat(file)
            size += stat.st_size
            identity = (os.path.abspath(file), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
            total.update(f"{identity}\n".encode())
        return total.hexdigest(), size

    @property
    def _is_large(self) -> bool:
        return self._stamp[1] >= LARGE_BYTES or len(self.files) >= LARGE_FILES

    @property
    def _cache_file(self) -> Path:
        return Path(constants.HF_HOME) / "saemill" / "corpora" / self._stamp[0]

    def _cached_digest(self) -> str | None:
        """The cached digest of the files as they are now; None if there is none or it is truncated."""
        with suppress(OSError, ValueError):
            if re.fullmatch("sha256:[0-9a-f]{64}", cached := self._cache_file.read_text(encoding="utf-8")):
                return cached
        return None

    def _hash_files(self) -> str:
        """A hash over the hashes of all files, in order, and over their kinds if text is mixed with rows."""
        total = hashlib.sha256()
        is_mixed = len(set(map(_has_rows, self.files))) > 1
        for file in self.files:
            with file.open("rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
            if is_mixed:
                total.update(b"rows" if _has_rows(file) else b"text")
        return f"sha256:{total.hexdigest()}"

    @property
    def settings(self) -> dict[str, Any]:
        has_columns = any(map(_has_rows, self.files))
        kind = "file" if self._path.is_file() else "folder"
        return {"kind": kind} | ({"column": self._column} if has_columns else {})

    def documents(self, state: State | None = None) -> Iterator[str]:
        """All documents, or those after `state`. Files before the one it was taken in are not opened, unless it is from
        an earlier version, which recorded no file."""
        self._file, self._before = ((state or {}).get(name, 0) for name in ("file", "before"))
        return super().documents(state)

    def state(self) -> State:
        return super().state() | {"file": self._file, "before": self._before}

    def _texts(self) -> Iterator[str]:
        """All texts from the current file on."""
        count = self._before
        for number in range(self._file, len(self.files)):
            self._file, self._before = number, count
            for text in self._texts_of(self.files[number]):
                count += 1
                yield text

    def _texts_of(self, file: Path) -> Iterator[str]:
        suffix = file.suffix.lower()
        if suffix in JSONL_SUFFIXES:
            yield from _rows_of_jsonl(file, self._column)
        elif suffix in PARQUET_SUFFIXES:
            yield from _rows_of_parquet(file, self._column)
        elif self._path.is_file():
            yield from _blocks_of_text(file)
        else:
            yield _text_of(file)


def _is_read(file: Path) -> bool:
    return file.suffix.lower() in FILE_SUFFIXES


def _has_rows(file: Path) -> bool:
    return file.suffix.lower() in (*JSONL_SUFFIXES, *PARQUET_SUFFIXES)


def _blocks_of_text(file: Path) -> Iterator[str]:
    """Blocks of lines between blank lines; single lines if no line is blank."""
    whole_lines = not _has_blank_line_inside(file)
    block, start = bytearray(), 1
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                block += line
            if len(block) > LARGEST_BYTES:
                raise _too_large(
                    f"{file}, line {start}",
                    "Blank lines separate the documents of a text file; without any, each line is one. Put "
                    "blank lines where documents end, or remove the few that make documents of many lines",
                )
            if block and (whole_lines or not line.strip()):
                yield _decoded(bytes(block), f"{file}, line {start}")
                block.clear()
            if not block:
                start = number + 1
    if block:
        yield _decoded(bytes(block), f"{file}, line {start}")


def _text_of(file: Path) -> str:
    if file.stat().st_size > LARGEST_BYTES:
        raise _too_large(f"{file}", "In a folder each text file is one document: cut it into several files")
    return _decoded(file.read_bytes(), f"{file}")


def _too_large(where: str, remedy: str) -> DocumentInvalid:
    return DocumentInvalid(
        f"{where}: expected documents of at most {say_size(LARGEST_BYTES)}, found a larger one. {remedy}, or write "
        ".jsonl with a line for each document"
    )


def _has_blank_line_inside(file: Path) -> bool:
    """Whether a blank line lies between two other lines."""
    seen_text = seen_blank = False
    with file.open("rb") as lines:
        for line in lines:
            if line.strip():
                if seen_blank:
                    return True
                seen_text = True
            elif seen_text:
                seen_blank = True
    return False


def _rows_of_jsonl(file: Path, column: str) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{file}, line {number}"
                yield cell_text(_cell(_decoded(line, where), column, where), where)


def _cell(line: str, column: str, where: str) -> object:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DocumentInvalid(f"{where} is not JSON ({error}). Correct or remove this line, then run again") from None
    if not isinstance(row, dict) or column not in row:
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DocumentInvalid(f"{where}: expected an object with {column!r}, found {keys}. Name another with --column")
    return row[column]


def _rows_of_parquet(file: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                raise CorpusUnavailable(
                    f"{file} has no column {column!r}; it has {', '.join(table.schema_arrow.names)}. "
                    "Name one of them with --column"
                )
            row = 0
            for batch in table.iter_batches(PARQUET_ROWS, columns=[column]):
                for cell in batch.column(0):
                    where = f"{file}, row {row}"
                    try:
                        yield cell_text(cell.as_py(), where)
                    except UnicodeDecodeError as error:
                        raise _not_utf8(where, error) from None
                    row += 1
    except (pyarrow.ArrowInvalid, OSError) as error:  # a corrupt page is an OSError
        raise CorpusUnavailable(
            f"{file} cannot be read as parquet: {error}. Restore or remove it, then run again"
        ) from None


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from None


def _not_utf8(where: str, error: UnicodeDecodeError) -> DocumentInvalid:
    return DocumentInvalid(
        f"{where}: byte {error.object[error.start]:#04x} at {error.start} of this document is not UTF-8. "
        "Convert the file to UTF-8 or remove the document, then run again"
    )


def is_local(options: DatasetOptions) -> bool:
    """Whether the path exists, or the name can only be meant as a path."""
    name = options.dataset
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in FILE_SUFFIXES
    return not name or is_path or os.path.exists(os.path.expanduser(name))


def open_local(options: DatasetOptions) -> LocalCorpus:
    path = Path(os.path.expanduser(options.dataset))  # `~unknown` stays as it is, without an error
    if not options.dataset or not path.exists():  # an unset shell variable must not mean this folder
        raise CorpusUnavailable(
            f"there is no file or folder {options.dataset!r}. Give a text, jsonl or parquet file or a folder of them, "
            f"the id of a data set on the hub such as {OPENWEBTEXT}, or `{STDLIB}`"
        )
    if path.is_file() and (remedy := NO_TEXT.get(path.suffix.lower())):
        raise CorpusUnavailable(
            f"{options.dataset}: expected text ({', '.join(TEXT_SUFFIXES)}), or rows as {', '.join(JSONL_SUFFIXES)} or "
            f".parquet, found {path.suffix}. {remedy}"
        )
    corpus = LocalCorpus(path, options.column)
    if "column" in options.given and "column" not in corpus.settings:
        raise SettingInvalid(
            f"{options.given['column']}: {options.dataset} is plain text, which has no columns. Leave it out"
        )
    return corpus


SOURCE = Source(
    help="a text, jsonl or parquet file or a folder of them",
    takes=is_local,
    open=open_local,
    rank=1,
    heeds=("column",),
)
