"""Snippets of the running Python's standard library, by library and by kind: code, or prose.

1. A module's documentation strings and its runs of comment lines are prose; what is left is code.
2. Both are cut at line ends into snippets of about `SNIPPET_CHARACTERS`.
3. The last snippets of every module are for tests, so that no text is in both parts.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ....harvest.corpus.stdlib import stdlib_documents, text_digest

LIBRARIES = ("asyncio", "email", "importlib", "unittest", "xml")
SNIPPET_CHARACTERS = 140
TEST_SHARE = 0.35

Kind = Literal["code", "prose"]
KINDS: tuple[Kind, Kind] = ("code", "prose")


@dataclass(frozen=True)
class Snippet:
    library: str
    kind: Kind
    text: str
    is_test: bool


@cache
def snippets() -> tuple[Snippet, ...]:
    """All snippets, each text once, in the order of the modules' names."""
    found: dict[str, Snippet] = {}
    for name, text in _documents():
        for kind, lines in split_lines(text).items():
            cut = list(cut_snippets(lines))
            first_test = len(cut) - int(TEST_SHARE * len(cut))
            for number, piece in enumerate(cut):
                found.setdefault(piece, Snippet(name.split("/")[0], kind, piece, number >= first_test))
    return tuple(found.values())


@cache
def revision() -> str:
    """A hash of the text: it differs from one Python to another."""
    return f"sha256:{text_digest(_documents())}"


def split_lines(text: str) -> dict[Kind, list[str]]:
    """The lines of a module by kind: prose without its quotation marks or hashes, nothing blank."""
    prose = {
        number for start, stop in (*_docstring_spans(text), *_comment_spans(text)) for number in range(start, stop)
    }
    numbered = list(enumerate(text.splitlines(), 1))
    bare = [line.strip().strip("\"'#").strip() for number, line in numbered if number in prose]
    return {
        "code": [line.rstrip() for number, line in numbered if number not in prose and line.strip()],
        "prose": [line for line in bare if any(map(str.isalpha, line))],
    }


def cut_snippets(lines: Iterable[str], characters: int = SNIPPET_CHARACTERS) -> Iterator[str]:
    """Lines joined until they are long enough; a remainder is left out."""
    held = ""
    for line in lines:
        held += line + "\n"
        if len(held) > characters:
            yield held[: 2 * characters].rstrip()
            held = ""


def _documents() -> list[tuple[str, str]]:
    return [(name, text) for name, text in stdlib_documents() if name.split("/")[0] in LIBRARIES and ":" not in name]


def _docstring_spans(text: str) -> Iterator[tuple[int, int]]:
    """First line and the one after the last of every string that stands alone as a statement."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, (node.end_lineno or node.lineno) + 1


def _comment_spans(text: str) -> Iterator[tuple[int, int]]:
    """Every line that is a comment and nothing else."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            yield token.start[0], token.start[0] + 1
