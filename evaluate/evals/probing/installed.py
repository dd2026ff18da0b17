"""Probing data made from installed text: which library a snippet is from, code or prose, and order.

No download, the same on every machine with the same Python. Names begin with `stdlib/`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from ...errors import DataMissing
from . import order
from .collection import BinarySet
from .stdlib import KINDS, LIBRARIES, Snippet, snippets
from .texts import Classes, Table, Task, balanced, by_class

PREFIX = "stdlib/"
LIBRARY, KIND = "stdlib/library", "stdlib/kind"
NAMES = (LIBRARY, KIND, *(f"{PREFIX}{name}" for name in order.TASKS))
BINARY_NAMES = (KIND, f"{PREFIX}first", f"{PREFIX}reordered")
BINARY_ROWS = 400


def load_table(is_test: bool) -> Table:
    """Snippets with their library and their kind."""
    chosen = _part(is_test)
    return Table(*zip(*((s.text, s.library, s.kind) for s in chosen), strict=True))


def load_task(name: str, train_size: int, test_size: int, seed: int) -> Task:
    """One data set, drawn as SAEBench draws its own: sizes are of one binary probe."""
    if name not in NAMES:
        raise DataMissing(f"there is no data set {name!r} made from installed text: choose of {', '.join(NAMES)}")
    train, test = (_draw(name, is_test, size, seed) for is_test, size in ((False, train_size), (True, test_size)))
    return Task(name, train, test)


def load_binary(name: str, seed: int) -> BinarySet:
    """A data set of two classes as shuffled prompts with labels."""
    if name not in BINARY_NAMES:
        raise DataMissing(
            f"there is no binary data set {name!r} of installed text: choose of {', '.join(BINARY_NAMES)}"
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
            f"{name}: expected at most {smallest} texts a class, asked for {size // 2}: take smaller sets"
        )
    return order.TASKS[name.removeprefix(PREFIX)](chosen, size // 2, random.Random(seed))


def _part(is_test: bool) -> Sequence[Snippet]:
    return [snippet for snippet in snippets() if snippet.is_test == is_test]
