"""The data sets of SAEBench by their real names, from the Hugging Face hub; nothing downloaded is ever run.

Sampling follows SAEBench 0.6.0: tables of two labels are balanced over the second, news and sentiment are drawn class
by class, translated speeches and source files are read from the head of a stream and shuffled. A repository whose data
come from a script is read through its parquet conversion.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar

from ....cache_schema.numbers_in_words import first_line
from ....harvest.corpus.hugging_face import CONVERSION, find_repository
from ....harvest.corpus.source import DatasetOptions
from ....harvest.errors import HarvestError
from ....harvest.network import NETWORK_ERRORS, load_dataset
from ...context.evaluation_data_sets import commit_of, commits_of
from ...errors import DataMissing
from .draw_classes import Classes, Table, Task, balanced, by_class

T = TypeVar("T")
LOAD_ERRORS = (*NETWORK_ERRORS, ValueError, RuntimeError, HarvestError)  # no access, no such split, a script

BIOS = "LabHC/bias_in_bios"
AMAZON = "canrager/amazon_reviews_mcauley_1and5"
SENTIMENT = f"{AMAZON}_sentiment"
GITHUB = "codeparrot/github-code"
NEWS = "fancyzhx/ag_news"
EUROPARL = "Helsinki-NLP/europarl"

CLASSES: Mapping[str, tuple[Any, ...]] = {
    f"{BIOS}_class_set1": (0, 1, 2, 6, 9),
    f"{BIOS}_class_set2": (11, 13, 14, 18, 19),
    f"{BIOS}_class_set3": (20, 21, 22, 25, 26),
    AMAZON: (1, 2, 3, 5, 6),
    SENTIMENT: (1.0, 5.0),
    GITHUB: ("C", "Python", "HTML", "Java", "PHP"),
    NEWS: (0, 1, 2, 3),
    EUROPARL: ("en", "fr", "de", "es", "nl"),
}
NAMES = tuple(CLASSES)

SPEECHES = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
"""The pair of languages from which each language is read."""
LICENSE_CHARACTERS = 150  # at the head of a source file
COLUMNS = {BIOS: ("hard_text", "profession", "gender"), AMAZON: ("text", "category", "rating")}


def load_task(name: str, train_size: int, test_size: int, seed: int) -> Task:
    """One data set; sizes are those of one binary probe, half of it the class itself."""
    if name not in CLASSES:
        raise DataMissing(f"there is no probing data set {name!r}: choose from {', '.join(NAMES)}")
    return Task(name, *_draw(name, train_size, test_size, seed))


def load_table(name: str, is_test: bool) -> Table:
    """The table behind a data set of two labels; several sets of classes share one."""
    return _table(repository_of(name), is_test)


def repository_of(name: str) -> str:
    return AMAZON if name == SENTIMENT else name.split("_class_set")[0]


def revision(names: Sequence[str]) -> dict[str, str] | None:
    """The commits at which these data sets' repositories are read."""
    return commits_of(dict.fromkeys(repository_of(name) for name in names if name in CLASSES), converted=(GITHUB,))


@lru_cache(maxsize=2)  # train and test of one data set: a process outlives many
def _table(id: str, is_test: bool) -> Table:
    def read() -> Table:
        rows = load_dataset(id, split="test" if is_test else "train", revision=commit_of(id))
        return Table(*(list(rows[column]) for column in COLUMNS[id]))

    return reached(id, read)


def reached(id: str, load: Callable[[], T]) -> T:
    """The result of `load`; if it fails, raises a DataMissing that says what to do."""
    try:
        return load()
    except (*LOAD_ERRORS, KeyError) as error:
        raise DataMissing(
            f"data set {id} cannot be loaded ({type(error).__name__}: {first_line(error)}): connect to the network, or "
            f"download it beforehand (`hf download --repo-type dataset {id}`); if its page asks for it, accept its "
            "terms and log in (`hf auth login`). `--set EVALUATION.data=stdlib`, such as "
            "`--set sparse_probing.data=stdlib`, probes with text of this Python instead"
        ) from error


def _draw(name: str, train_size: int, test_size: int, seed: int) -> tuple[Classes, Classes]:
    classes = CLASSES[name]
    if name in (GITHUB, EUROPARL):
        read = read_files if name == GITHUB else read_speeches
        found = reached(name, lambda: read((train_size + test_size) // 2))
        return split_shuffled(found, classes, train_size // 2, test_size // 2, seed)
    return _draw_part(name, classes, False, train_size, seed), _draw_part(name, classes, True, test_size, seed)


def _draw_part(name: str, classes: Sequence[Any], is_test: bool, size: int, seed: int) -> Classes:
    if name == NEWS:
        split = "test" if is_test else "train"
        rows = reached(NEWS, lambda: load_dataset(NEWS, split=split, revision=commit_of(NEWS)))
        return by_class(list(rows["text"]), list(rows["label"]), classes, size // 2, seed)
    if name == SENTIMENT:
        table = load_table(AMAZON, is_test)
        return by_class(table.text, [float(rating) for rating in table.column2], classes, size // 2, seed)  # type: ignore[arg-type]
    return balanced(load_table(name, is_test), classes, size // 4, seed)


def split_shuffled(
    found: Mapping[str, list[str]], classes: Sequence[str], train: int, test: int, seed: int
) -> tuple[Classes, Classes]:
    """Shuffle the texts of each class, one class after the other, and cut them in two."""
    rng = random.Random(seed)
    shuffled = {name: list(found.get(name, ())) for name in classes}
    for name, texts in shuffled.items():
        if len(texts) < train + test:
            raise DataMissing(f"expected {train + test} texts of {name}, found {len(texts)}: ask for smaller sets")
        rng.shuffle(texts)
    return (
        {name: texts[:train] for name, texts in shuffled.items()},
        {name: texts[train : train + test] for name, texts in shuffled.items()},
    )


def read_speeches(count: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for language, pair in SPEECHES.items():
        rows = load_dataset(EUROPARL, pair, split="train", revision=commit_of(EUROPARL), streaming=True)
        found[language] = [row["translation"][language] for row in islice(rows, count + 1)]  # SAEBench takes one more
    return found


def read_files(count: int) -> dict[str, list[str]]:
    """Source files in the order of the stream, until there are more than `count` in every language."""
    repository = find_repository(DatasetOptions(GITHUB, config="all-all"))
    commit = commit_of(GITHUB, CONVERSION) or repository.commit
    urls = [f"hf://datasets/{GITHUB}@{commit}/{name}" for name in repository.files]
    return collect_files(load_dataset("parquet", data_files={"train": urls}, split="train", streaming=True), count)


def collect_files(rows: Iterable[Mapping[str, Any]], count: int) -> dict[str, list[str]]:
    """Files by language, without their head, which is mostly a licence."""
    found: dict[str, list[str]] = {language: [] for language in CLASSES[GITHUB]}
    for row in rows:
        if row["language"] not in found:
            continue
        if len(row["code"]) > LICENSE_CHARACTERS + 128 * 3:  # shorter files are left out
            found[row["language"]].append(row["code"][LICENSE_CHARACTERS:])
        if all(len(files) > count for files in found.values()):
            break
    return found
