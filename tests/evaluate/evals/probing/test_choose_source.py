"""Where texts come from: installed text, the hub, the package sae-probes; and what is said when they do not."""

from __future__ import annotations

import csv
import io
from collections import Counter

import pyarrow
import pytest

from saemill.evaluate.context.context import Context
from saemill.evaluate.errors import DataMissing
from saemill.evaluate.evals.probing import sae_probes_package, saebench_texts, stdlib_texts
from saemill.evaluate.evals.probing.source_and_settings import HUB, STDLIB, find_source, load_all

MODULE = '''"""What the module is for, in a sentence that is long enough to count."""

import os  # not prose: code stands before it

# a comment that says
# why it is so


def work(x):
    """Double x."""
    text = "a string that is no documentation"
    return 2 * x
'''


def test_lines_are_split_into_code_and_prose():
    lines = stdlib_texts.split_lines(MODULE)
    assert lines["prose"] == [
        "What the module is for, in a sentence that is long enough to count.",
        "a comment that says",
        "why it is so",
        "Double x.",
    ]
    assert lines["code"] == [
        "import os  # not prose: code stands before it",
        "def work(x):",
        '    text = "a string that is no documentation"',
        "    return 2 * x",
    ]


def test_snippets_are_long_enough_and_a_remainder_is_left_out(monkeypatch):
    monkeypatch.setattr(stdlib_texts, "SNIPPET_CHARACTERS", 8)
    assert list(stdlib_texts.cut_snippets(["abcd", "efgh", "ij", "kl"])) == ["abcd\nefgh"]


@pytest.mark.parametrize("name", stdlib_texts.NAMES)
def test_installed_data_sets_are_balanced_repeatable_and_split(name):
    task = stdlib_texts.load_task(name, STDLIB.train_size, STDLIB.test_size, 42)
    again = stdlib_texts.load_task(name, STDLIB.train_size, STDLIB.test_size, 42)
    assert task == again
    assert task != stdlib_texts.load_task(name, STDLIB.train_size, STDLIB.test_size, 43)
    for part, size in ((task.train, STDLIB.train_size), (task.test, STDLIB.test_size)):
        assert {len(texts) for texts in part.values()} == {size // 2}
    texts = [{text for each in part.values() for text in each} for part in (task.train, task.test)]
    assert not texts[0] & texts[1]


@pytest.mark.parametrize("name", stdlib_texts.TASKS)
def test_order_tasks_hold_the_same_pieces_in_every_class(name):
    task = stdlib_texts.load_task(f"stdlib/{name}", 40, 20, 0)
    for rows in zip(*task.train.values(), strict=True):
        characters = [Counter("".join(text.split())) for text in rows]
        assert all(counter == characters[0] for counter in characters)
        assert len(set(rows)) > 1


def test_more_text_than_there_is_is_refused():
    for name in stdlib_texts.NAMES:
        with pytest.raises(DataMissing, match=r"ask(ed)? for"):
            stdlib_texts.load_task(name, 10**6, 200, 0)
    with pytest.raises(DataMissing, match="stdlib/library"):
        stdlib_texts.load_task("stdlib/none", 40, 20, 0)


def test_binary_data_sets_have_two_labels_of_equal_number():
    data = stdlib_texts.load_binary("stdlib/first", 0)
    assert len(data.prompts) == len(data.labels) == stdlib_texts.BINARY_ROWS
    assert data.labels.sum() == len(data.labels) // 2
    with pytest.raises(DataMissing, match="stdlib/kind"):
        stdlib_texts.load_binary("stdlib/position", 0)


class Place:
    takes_library = Context.takes_library

    def __init__(self, is_pocket: bool) -> None:
        self.is_pocket = is_pocket


@pytest.mark.parametrize(
    ("wanted", "is_pocket", "expected"),
    [("auto", True, STDLIB), ("auto", False, HUB), ("hub", True, HUB), ("stdlib", False, STDLIB)],
)
def test_auto_takes_installed_text_for_the_pocket_model_alone(wanted, is_pocket, expected):
    assert find_source(Place(is_pocket), wanted) is expected


@pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("no split"), RuntimeError("scripts")])
@pytest.mark.parametrize("name", saebench_texts.NAMES)
def test_whatever_keeps_a_data_set_away_is_one_error_that_says_what_to_do(monkeypatch, name, error):
    def fail(*_args, **_kwargs):
        raise error

    saebench_texts._table.cache_clear()
    monkeypatch.setattr(saebench_texts, "load_dataset", fail)
    monkeypatch.setattr(saebench_texts, "find_repository", fail)
    with pytest.raises(DataMissing, match=r"hf auth login.*--set sparse_probing\.data=stdlib") as caught:
        saebench_texts.load_task(name, 8, 4, 42)
    assert str(error) in str(caught.value)
    assert caught.value.__cause__ is error


def test_the_hubs_tables_are_drawn_by_class(monkeypatch):
    def rows(_id, split, revision):
        count = 400 if split == "train" else 200
        return {
            "text": [f"{split} {i}" for i in range(count)],
            "category": [i % 5 + 1 + (i % 5 > 2) for i in range(count)],
            "rating": [1.0 if i // 5 % 2 else 5.0 for i in range(count)],
        }

    saebench_texts._table.cache_clear()
    monkeypatch.setattr(saebench_texts, "load_dataset", rows)
    task = saebench_texts.load_task(saebench_texts.AMAZON, 40, 20, 42)
    assert list(task.train) == ["1", "2", "3", "5", "6"]
    assert {len(texts) for texts in task.train.values()} == {20}
    sentiment = saebench_texts.load_task(saebench_texts.SENTIMENT, 40, 20, 42)
    assert list(sentiment.test) == ["1.0", "5.0"]
    assert all(text.startswith("test") for text in sentiment.test["5.0"])
    saebench_texts._table.cache_clear()


def test_no_more_than_one_data_set_is_kept_in_memory(monkeypatch):
    def rows(_id, split, revision):
        return {key: [split] for key in ("text", "category", "rating", "hard_text", "profession", "gender")}

    saebench_texts._table.cache_clear()
    monkeypatch.setattr(saebench_texts, "load_dataset", rows)
    tables = [
        saebench_texts.load_table(name, is_test)
        for name in (saebench_texts.AMAZON, saebench_texts.BIOS)
        for is_test in (False, True)
    ]
    assert [table.text for table in tables] == [["train"], ["test"]] * 2
    assert saebench_texts._table.cache_info().currsize == 2
    saebench_texts._table.cache_clear()


def test_what_can_be_had_is_taken_and_the_rest_is_named():
    def load(name):
        if name != "good":
            raise DataMissing(f"{name} is away")
        return [name]

    assert load_all(["good"], load) == (["good"], None)
    assert load_all(["bad", "good", "worse"], load) == (["good"], "bad is away; worse is away")
    with pytest.raises(DataMissing, match="bad is away"):
        load_all(["bad"], load)


def write_table(path, rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(text.getvalue().encode())


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package like sae-probes that would break if it were imported."""
    folder = tmp_path / "sae_probes"
    (folder / "data" / "cleaned_data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    index = [
        {"Dataset save name": "cleaned_data/5_first.csv", "Data type": "Binary Classification"},
        {"Dataset save name": "cleaned_data/6_more.csv", "Data type": "Continuous Data"},
    ]
    write_table(folder / "data" / sae_probes_package.INDEX, index)
    rows = [{"prompt": 'a, "quoted"\nline', "target": "yes"}, {"prompt": "b", "target": "no"}]
    write_table(folder / "data" / "cleaned_data" / "5_first.csv.zst", rows)
    monkeypatch.syspath_prepend(str(tmp_path))
    sae_probes_package._read.cache_clear()
    return folder


def test_the_collection_is_read_without_importing_its_package(package):
    assert sae_probes_package.names() == ("5_first",)
    data = sae_probes_package.load("5_first")
    assert list(data.prompts) == ['a, "quoted"\nline', "b"]
    assert data.labels.tolist() == [1, 0]


def test_a_damaged_or_absent_collection_says_how_to_install_it(package, monkeypatch):
    (package / "data" / "cleaned_data" / "5_first.csv.zst").write_bytes(b"no zstd")
    with pytest.raises(DataMissing, match="pip install --no-deps sae-probes"):
        sae_probes_package.load("5_first")
    with pytest.raises(DataMissing, match="pip install"):
        sae_probes_package.load("7_never")
    monkeypatch.setattr(sae_probes_package, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(
        DataMissing, match=r"pip install --no-deps sae-probes.*--set sparse_probing_sae_probes\.data=stdlib"
    ):
        sae_probes_package.names()


def test_more_than_two_labels_are_refused():
    with pytest.raises(DataMissing, match="two labels"):
        sae_probes_package.as_labels(["a", "b", "c"])
