"""Labelled texts of the running Python's standard library: by library, code or prose, and order.

No download, the same on every machine with the same Python. Names begin with `stdlib/`.

1. A module's documentation strings and comment lines are prose; the rest is code.
2. Both are cut at line ends into snippets of about `SNIPPET_CHARACTERS`.
3. The last snippets of every module are for tests, so that no text is in both parts.

The classes of some data sets differ only in order, which a bag of words cannot tell apart:

`first`      a piece of code and a piece of prose: which came first
`reordered`  the words of a snippet as they were written, or shuffled
`position`   a piece of prose at the beginning, in the middle or at the end of code

In these, all classes hold the same pieces, so that only their order says which class a text belongs to.
"""

from __future__ import annotations

import ast
import io
import random
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from ....harvest.corpus.stdlib import stdlib_documents, text_digest
from ...errors import DataMissing
from .draw_classes import BinarySet, Classes, Table, Task, balanced, by_class

LIBRARIES = ("asyncio", "email", "importlib", "unittest", "xml")
SNIPPET_CHARACTERS = 140

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
            first_test = len(cut) - int(0.35 * len(cut))
            for number, piece in enumerate(cut):
                found.setdefault(piece, Snippet(name.split("/")[0], kind, piece, number >= first_test))
    return tuple(found.values())


@cache
def revision() -> str:
    """A hash of the text, which differs between versions of Python."""
    return f"sha256:{text_digest(_documents())}"


def split_lines(text: str) -> dict[Kind, list[str]]:
    """The lines of a module by kind: prose without its quotation marks or hashes, nothing blank."""
    prose = set[int]()
    for node in ast.walk(ast.parse(text)):  # strings that stand alone as a statement
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):  # lines that are a comment and nothing else
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            prose.add(token.start[0])
    numbered = list(enumerate(text.splitlines(), 1))
    bare = [line.strip().strip("\"'#").strip() for number, line in numbered if number in prose]
    return {
        "code": [line.rstrip() for number, line in numbered if number not in prose and line.strip()],
        "prose": [line for line in bare if any(map(str.isalpha, line))],
    }


def cut_snippets(lines: Iterable[str]) -> Iterator[str]:
    """Lines joined until they are long enough; a remainder is left out."""
    held = ""
    for line in lines:
        held += line + "\n"
        if len(held) > SNIPPET_CHARACTERS:
            yield held[: 2 * SNIPPET_CHARACTERS].rstrip()
            held = ""


def _documents() -> list[tuple[str, str]]:
    return [(name, text) for name, text in stdlib_documents() if name.split("/")[0] in LIBRARIES and ":" not in name]


Groups = dict[str, list[str]]


def first(snippets: Sequence[Snippet], count: int, rng: random.Random) -> Groups:
    codes, proses = (_pieces(snippets, kind, count, rng, 60) for kind in KINDS)
    pairs = list(zip(codes, proses, strict=True))
    return {
        "code_first": [f"{code}\n{prose}" for code, prose in pairs],
        "prose_first": [f"{prose}\n{code}" for code, prose in pairs],
    }


def reordered(snippets: Sequence[Snippet], count: int, rng: random.Random) -> Groups:
    written = [" ".join(text.split()) for text in _pieces(snippets, "prose", count, rng)]
    return {"as_written": written, "shuffled": [_shuffled(text, rng) for text in written]}


def position(snippets: Sequence[Snippet], count: int, rng: random.Random) -> Groups:
    codes = [(code[:36], code[36:]) for code in _pieces(snippets, "code", count, rng, 72)]
    parts = list(zip(_pieces(snippets, "prose", count, rng, 45), codes, strict=True))
    return {
        "beginning": [f"{prose}\n{one}\n{two}" for prose, (one, two) in parts],
        "middle": [f"{one}\n{prose}\n{two}" for prose, (one, two) in parts],
        "end": [f"{one}\n{two}\n{prose}" for prose, (one, two) in parts],
    }


TASKS = {"first": first, "reordered": reordered, "position": position}


def _pieces(
    snippets: Sequence[Snippet], kind: Kind, count: int, rng: random.Random, characters: int | None = None
) -> list[str]:
    """Drawn snippets, or beginnings of them: short enough that no class loses more of its end than another."""
    texts = [snippet.text for snippet in snippets if snippet.kind == kind]
    return [text[:characters] for text in rng.sample(texts, count)]


def _shuffled(text: str, rng: random.Random) -> str:
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


PREFIX = "stdlib/"
LIBRARY, KIND = "stdlib/library", "stdlib/kind"
NAMES = (LIBRARY, KIND, *(f"{PREFIX}{name}" for name in TASKS))
BINARY_NAMES = (KIND, f"{PREFIX}first", f"{PREFIX}reordered")
BINARY_ROWS = 400


def load_table(is_test: bool) -> Table:
    chosen = _part(is_test)
    return Table(*zip(*((s.text, s.library, s.kind) for s in chosen), strict=True))


def load_task(name: str, train_size: int, test_size: int, seed: int) -> Task:
    """One data set, drawn as SAEBench draws its own: sizes are those of one binary probe."""
    if name not in NAMES:
        raise DataMissing(f"there is no data set {name!r} of installed text: choose from {', '.join(NAMES)}")
    return Task(name, _draw(name, False, train_size, seed), _draw(name, True, test_size, seed))


def load_binary(name: str, seed: int) -> BinarySet:
    """A data set of two classes as shuffled prompts with labels."""
    if name not in BINARY_NAMES:
        raise DataMissing(
            f"there is no binary data set {name!r} of installed text: choose from {', '.join(BINARY_NAMES)}"
        )
    negative, positive = _draw(name, False, BINARY_ROWS, seed).values()
    prompts = [*negative, *positive]
    labels = np.repeat([0, 1], [len(negative), len(positive)])
    rows = np.random.default_rng(seed).permutation(len(prompts))
    return BinarySet(name, [prompts[row] for row in rows], labels[rows])


def _draw(name: str, is_test: bool, size: int, seed: int) -> Classes:
    if name == LIBRARY:
        return balanced(load_table(is_test), LIBRARIES, size // 4, seed)
    if name == KIND:
        table = load_table(is_test)
        return by_class(table.text, table.column2, KINDS, size // 2, seed)
    chosen = _part(is_test)
    smallest = min(sum(snippet.kind == kind for snippet in chosen) for kind in KINDS)
    if size // 2 > smallest:
        raise DataMissing(
            f"{name}: expected at most {smallest} texts of a class, found {size // 2}: ask for smaller sets"
        )
    return TASKS[name.removeprefix(PREFIX)](chosen, size // 2, random.Random(seed))


def _part(is_test: bool) -> Sequence[Snippet]:
    return [snippet for snippet in snippets() if snippet.is_test == is_test]
