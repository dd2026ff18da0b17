"""For all tests: a clean environment, interpreted Triton kernels without a GPU, and templates of CONTRIBUTING.md.

Tests that inject faults report them; `pytest -s -m faults` prints the reports as the table of docs/guarantees.md.
"""

from __future__ import annotations

import os

os.environ.pop("HF_HUB_OFFLINE", None)  # read when the Hub's library is imported
os.environ.pop("TRANSFORMERS_OFFLINE", None)

import gc
import importlib
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings

from saemill.harvest.corpus import sources

from . import thread_ranks

# Examples may take long on a busy machine. Every run draws the same ones, so that a failure comes from the change that
# is tested; `make test-slow` draws others.
settings.register_profile("the same", deadline=None, derandomize=True)
settings.register_profile("others", deadline=None)
settings.load_profile("the same")
torch.set_num_threads(1)  # tiny models are slower on more, especially on a busy machine
for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)  # tests read the output of commands, which must not depend on the terminal
for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "AWS_PROFILE"):
    os.environ.pop(name, None)  # the last one for the S3 server too
for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[name]
os.environ["NO_PROXY"] = "127.0.0.1"  # where the tests' servers are
os.environ["TERM"] = "xterm"
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel


def pytest_collection_finish(session: pytest.Session) -> None:
    """Freeze everything imported so far: runs collect garbage first, which would otherwise take half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Without `fsync`, which matters only when the power fails, and would cost minutes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="session")
def template() -> Callable[[str], str]:
    """A function that finds the code block of CONTRIBUTING.md whose first line names a file."""
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()

    def find(place: str) -> str:
        found = re.findall(rf"^```python\n# {re.escape(place)}.*?\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        assert len(found) == 1, f"CONTRIBUTING.md: expected one template for {place}, found {len(found)}"
        return found[0]

    return find


@pytest.fixture(scope="session")
def entry(template: Callable[[str], str]) -> Callable[[str, dict[str, Any]], tuple[str, Any]]:
    """A function that evaluates a template of one dictionary entry, with the given names, to its key and value."""

    def read(place: str, names: dict[str, Any]) -> tuple[str, Any]:
        ((key, value),) = eval(f"{{{template(place)}}}", names).items()  # noqa: S307  (our own page)
        return key, value

    return read


@pytest.fixture
def copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: Callable[[str], str]
) -> Iterator[Callable[[ModuleType, str], str]]:
    """Copy a template into its package until the test ends: copied(package, "folder/name.py")."""
    names: list[str] = []

    def copy(package: ModuleType, place: str) -> str:
        (tmp_path / "copied").mkdir(exist_ok=True)
        file = tmp_path / "copied" / Path(place).name
        file.write_text(template(place))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(file.parent)])
        names.append(f"{package.__name__}.{file.stem}")
        importlib.invalidate_caches()
        sources.cache_clear()
        return file.stem

    yield copy
    sources.cache_clear()
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def sigterm_is_harmless() -> Iterator[None]:
    """Ignore SIGTERM unless the tested code catches it: it would end the tests."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str, Mapping[str, int]], None]:
    """Report what was tried and the faults injected: tell("3 stores", {"EIO": 5}). A test that finds a loss fails."""

    def record(tried: str, faults: Mapping[str, int]) -> None:
        counts = ", ".join(f"{count:,} x {kind}" for kind, count in sorted(faults.items()))
        record_property("faults", f"{tried} | {counts} | 0")

    return record


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table of faults, from the reports of all processes."""
    rows = [
        f"| {value} | `{report.nodeid}` |"
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "faults"
    ]
    if rows and config.getoption("capture") == "no":
        terminalreporter.write_line("\n| tried | faults | lost | test |\n|---|---|---|---|\n" + "\n".join(rows))


@pytest.fixture(scope="session")
def threads() -> Callable[[int], Any]:
    """`threads(n)`: n ranks, and a function that runs `work(rank)` in each and returns the results."""
    return thread_ranks.make


@pytest.fixture(scope="module")
def memory_folder() -> Iterator[Path]:
    """A folder in memory if possible: faults are injected above the disk, whose slowness would test nothing."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)
