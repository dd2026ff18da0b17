"""For all tests: interpreted Triton kernels without a GPU; templates of CONTRIBUTING.md; a bad disk, bad input."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel


@pytest.fixture(scope="session")
def template() -> Callable[[str], str]:
    """A function from a heading of CONTRIBUTING.md to the code below it."""
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()

    def find(heading: str) -> str:
        section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        return code

    return find


def load_helper(name: str) -> ModuleType:
    """A module beside this one: tests are no package, so it is loaded by its path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shaky_disk() -> ModuleType:
    return load_helper("shaky_disk")


@pytest.fixture(scope="session")
def mutations() -> ModuleType:
    return load_helper("mutations")


@pytest.fixture(scope="session")
def threads() -> Callable[[int], Any]:
    """`threads(n)`: n ranks, and a function that gives what `work(rank)` returns in each."""
    return load_helper("thread_ranks").make


@pytest.fixture(scope="module")
def memory_folder() -> Iterator[Path]:
    """In memory where that can be, for what a disk does wrong is made here, and its slowness tests nothing."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)
