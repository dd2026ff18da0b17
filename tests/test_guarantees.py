"""docs/guarantees.md promises nothing that no test holds."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "guarantees.md").read_text()
NAME = re.compile(r"`(tests/[^`]+)`")
ROW = re.compile(r"\| (?P<tried>[^|]+) \| (?P<faults>(\d[\d,]* [^|,]+(, )?)+) \| 0 \| `(?P<test>tests/[^`]+)` \|")
SENTENCE = re.compile(r"- (?P<said>[^.].*?\.)(?P<tests>( `tests/[\w/]+\.py::test_\w+`)+)")
INSIDE = re.compile(r"[.!?] +[A-Z]")  # where a second sentence begins, which would stand there without a test
HARM = "pytest.mark.faults"
NEVER_RUN = ("pytest.mark.gpu", "pytest.mark.skip", "pytest.mark.xfail")


def find_problems(page: str) -> list[str]:
    """What a page promises in vain, line by line. What stands before its first area is an introduction."""
    found = []
    for line in page.partition("\n## ")[2].splitlines()[1:]:
        if not line or line.startswith(("## ", "| tried |", "|---|")):
            continue
        if row := ROW.fullmatch(line):
            file, _, test = re.sub(r"\[.*\]$", "", row["test"]).partition("::")
            if HARM not in marks_of(file).get(test, ()):
                found.append(f"no test that does harm (`pytest.mark.faults`): {row['test']}")
            continue
        promise = SENTENCE.fullmatch(line)
        if promise is None:
            found.append(f"expected `- One sentence.` and then its tests, found: {line}")
            continue
        if INSIDE.search(promise["said"]):
            found.append(f"two sentences in one line, of which one names no test: {line}")
        for name in NAME.findall(promise["tests"]):
            file, _, test = name.partition("::")
            marks = marks_of(file).get(test)
            if marks is None:
                found.append(f"there is no {name}")
            elif ("pytest.mark.slow" in marks) != ("`make test-slow`" in promise["said"]):
                found.append(f"a test that is slow is said to run in `make test-slow`, and no other is: {name}")
            elif any(mark.startswith(NEVER_RUN) for mark in marks):
                found.append(f"not run by everybody: {name}")
    return found


@cache
def marks_of(file: str) -> dict[str, list[str]]:
    """Names of the tests that a file defines, and their decorators, without importing it."""
    path = ROOT / file
    if not path.is_file():
        return {}
    nodes = ast.parse(path.read_text()).body
    return {
        node.name: [ast.unparse(mark) for mark in node.decorator_list]
        for node in nodes
        if isinstance(node, ast.FunctionDef)
    }


def test_every_sentence_has_a_test_that_exists():
    assert not find_problems(PAGE)
    assert len(NAME.findall(PAGE)) > 80


def test_every_test_that_does_harm_has_its_row_and_no_other():
    rows = {re.sub(r"\[.*\]$", "", row["test"]) for row in map(ROW.fullmatch, PAGE.splitlines()) if row}
    files = (str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py")))
    harmful = {f"{file}::{test}" for file in files for test, marks in marks_of(file).items() if HARM in marks}
    assert rows == harmful


HERE = "`tests/test_guarantees.py::test_every_sentence_has_a_test_that_exists`"
SLOW = "`tests/cache_schema/test_kills.py::test_killed_before_every_single_call`"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("- Nothing is lost.", "expected"),
        ("Nothing is lost.", "expected"),
        (f"- Nothing is lost, {HERE}", "expected"),
        (f"- Nothing is lost. All is well. {HERE}", "two sentences"),
        ("- Nothing is lost. `tests/test_guarantees.py::test_nothing_is_lost`", "there is no"),
        ("- Nothing is lost. `tests/test_no_file.py::test_nothing_is_lost`", "there is no"),
        (f"- Nothing is lost. {HERE} `tests/test_guarantees.py::test_x`", "there is no"),
        (f"- Nothing is lost. {SLOW}", "slow"),
        (f"- Nothing is lost, in `make test-slow`. {HERE}", "slow"),
        (f"| 3 stores | 5 EIO | 0 | {HERE} |", "no test that does harm"),
        ("| 3 stores | 5 EIO | 1 | `tests/test_guarantees.py::test_nothing_is_lost` |", "expected"),
    ],
)
def test_an_empty_promise_is_found(line, said):
    (problem,) = find_problems(f"# Guarantees\n\nWords.\n\n## The store\n\n{line}\n")
    assert said in problem


def test_a_promise_that_is_kept_is_none():
    harm = "`tests/cache_schema/test_kills.py::test_killed_before_every_single_call[1]`"
    table = f"| tried | faults | lost | test |\n|---|---|---|---|\n| 3 stores | 1,205 EIO, 7 short read | 0 | {harm} |"
    page = f"# Guarantees\n\nWords. More.\n\n## An area\n\n- It holds, `as.said`. {HERE} {HERE}\n\n{table}\n"
    assert not find_problems(page)
