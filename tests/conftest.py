"""For all tests: interpreted Triton kernels without a GPU; templates of CONTRIBUTING.md; a bad disk, bad input.

Tests that do harm on purpose tell what they did; `pytest -s -m faults` prints it as the table of docs/guarantees.md.
"""

from __future__ import annotations

import os

os.environ.pop("HF_HUB_OFFLINE", None)  # read when the hub's library is imported
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

# On a busy machine an example takes what it takes. The same ones are drawn every time: what others find is no fault of
# the change that happens to be tested. `make test-slow` draws others.
settings.register_profile("the same", deadline=None, derandomize=True)
settings.register_profile("others", deadline=None)
settings.load_profile("the same")
torch.set_num_threads(1)  # tiny models are slower on more, above all on a busy machine
for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)  # tests read what commands say, whatever the terminal is that they are run in
for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "AWS_PROFILE"):
    os.environ.pop(name, None)  # the last also from the server of S3's protocol
for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[name]
os.environ["NO_PROXY"] = "127.0.0.1"  # where the servers of tests are, whatever proxies a user has
os.environ["TERM"] = "xterm"
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel


def pytest_collection_finish(session: pytest.Session) -> None:
    """A run collects garbage first, which through all that was imported and collected takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Of small stores and runs: what `fsync` does for them shows only when the power fails, and costs minutes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="session")
def template() -> Callable[[str], str]:
    """A function from the place of a file to the code of CONTRIBUTING.md whose first line names it."""
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()

    def find(place: str) -> str:
        found = re.findall(rf"^```python\n# {re.escape(place)}.*?\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        assert len(found) == 1, f"CONTRIBUTING.md: expected one template for {place}, found {len(found)}"
        return found[0]

    return find


@pytest.fixture(scope="session")
def entry(template: Callable[[str], str]) -> Callable[[str, dict[str, Any]], tuple[str, Any]]:
    """A function from a place to the line of a dictionary that goes there, read with the names of that file."""

    def read(place: str, names: dict[str, Any]) -> tuple[str, Any]:
        ((key, value),) = eval(f"{{{template(place)}}}", names).items()  # noqa: S307  (our own page)
        return key, value

    return read


@pytest.fixture
def copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: Callable[[str], str]
) -> Iterator[Callable[[ModuleType, str], str]]:
    """A template as a file of its package, until the test ends: copied(package, "folder/name.py")."""
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
    """Unless what is tested catches it, it does nothing: it would end the tests."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str, Mapping[str, int]], None]:
    """`tell("3 stores", {"EIO": 5})`: what was tried, and what was done to it. A test that finds a loss fails."""
    return lambda tried, faults: record_property("faults", f"{tried} | {_list_counts(faults)} | 0")


def _list_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} x {kind}" for kind, count in sorted(counts.items()))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """From the reports of all processes."""
    told = [
        f"| {value} | `{report.nodeid}` |"
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "faults"
    ]
    if told and config.getoption("capture") == "no":
        terminalreporter.write_line("\n| tried | faults | lost | test |\n|---|---|---|---|\n" + "\n".join(told))


@pytest.fixture(scope="session")
def threads() -> Callable[[int], Any]:
    """`threads(n)`: n ranks, and a function that gives what `work(rank)` returns in each."""
    return thread_ranks.make


@pytest.fixture(scope="module")
def memory_folder() -> Iterator[Path]:
    """In memory where that can be, for what a disk does wrong is made here, and its slowness tests nothing."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)
