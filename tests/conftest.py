"""For all tests: Triton's kernels without a GPU are interpreted; the templates of CONTRIBUTING.md."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

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
