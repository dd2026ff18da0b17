"""Labelled texts, and how SAEBench draws its classes from them.

1. A `Table` has a text and two labels in each row (profession and gender, category and rating, library and kind).
2. `balanced` gives each class of the first label the same number of texts of every value of the second.
3. `by_class` draws texts of one label alone.
4. `spurious` makes the six groups of spurious-correlation removal, under the names SAEBench fixes.

Samples are those that `DataFrame.sample(n, random_state=seed)` of pandas draws, in the same order.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import DataMissing

Classes = Mapping[str, Sequence[str]]

OPPOSITES = {
    "male / female": "female_data_only",
    "professor / nurse": "nurse_data_only",
    "male_professor / female_nurse": "female_nurse_data_only",
}
"""The three probes of spurious-correlation removal, by SAEBench's names, and the groups of their negatives."""


@dataclass(frozen=True)
class Task:
    name: str
    train: Classes
    test: Classes

    def __post_init__(self) -> None:
        assert list(self.train) == list(self.test), "train and test have the same classes in the same order"


@dataclass(frozen=True, eq=False)
class BinarySet:
    name: str
    prompts: Sequence[str]
    labels: np.ndarray  # int64


@dataclass(frozen=True)
class Table:
    text: Sequence[str]
    column1: Sequence[Hashable]
    column2: Sequence[Hashable]

    def rows(self, value1: Hashable, value2: Hashable) -> list[str]:
        """The texts of one quadrant, in the table's order."""
        pairs = zip(self.text, self.column1, self.column2, strict=True)
        return [text for text, one, two in pairs if one == value1 and two == value2]


def sample(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` of the texts without replacement."""
    if len(texts) < count:
        raise DataMissing(f"expected at least {count} texts of a class, found {len(texts)}: ask for smaller sets")
    chosen = np.random.RandomState(seed).choice(len(texts), size=count, replace=False)
    return [texts[int(row)] for row in chosen]


def balanced(table: Table, classes: Sequence[Hashable], per_quadrant: int, seed: int) -> dict[str, list[str]]:
    """For each class of column 1: `per_quadrant` texts of every value of column 2, one value after the other."""
    values = sorted(set(table.column2))  # pyright: ignore[reportArgumentType] (labels of one column compare)
    return {
        str(name): [text for value in values for text in sample(table.rows(name, value), per_quadrant, seed)]
        for name in classes
    }


def by_class(
    texts: Sequence[str], labels: Sequence[Hashable], classes: Sequence[Hashable], per_class: int, seed: int
) -> dict[str, list[str]]:
    """For each class: `per_class` of its texts."""
    pairs = list(zip(texts, labels, strict=True))
    return {str(name): sample([text for text, label in pairs if label == name], per_class, seed) for name in classes}


def spurious(
    table: Table, pair1: tuple[Hashable, Hashable], pair2: tuple[Hashable, Hashable], per_quadrant: int, seed: int
) -> dict[str, list[str]]:
    """The groups in which a concept (`pair1`) and an attribute (`pair2`) are balanced or fully confounded.

    Column 2 of `table` plays male and female, column 1 professor and nurse: the names are SAEBench's.
    """
    pos_pos, pos_neg = (table.rows(value1, pair2[0]) for value1 in pair1)
    neg_pos, neg_neg = (table.rows(value1, pair2[1]) for value1 in pair1)
    double = 2 * per_quadrant + 1  # the confounded groups take twice a quadrant, and SAEBench requires one more text
    for one, wanted in ((pos_pos, double), (neg_neg, double), (pos_neg, per_quadrant), (neg_pos, per_quadrant)):
        if len(one) < wanted:
            raise DataMissing(f"expected at least {wanted} texts of a quadrant, found {len(one)}: ask for smaller sets")
    first = slice(0, per_quadrant)
    groups = {
        "male / female": pos_pos[first] + pos_neg[first],
        "female_data_only": neg_pos[first] + neg_neg[first],
        "professor / nurse": pos_pos[first] + neg_pos[first],
        "nurse_data_only": pos_neg[first] + neg_neg[first],
        "male_professor / female_nurse": pos_pos[: 2 * per_quadrant],
        "female_nurse_data_only": neg_neg[: 2 * per_quadrant],
    }
    rng = np.random.default_rng(seed)  # one generator for all six, in this order
    for group in groups.values():
        rng.shuffle(group)
    return groups
