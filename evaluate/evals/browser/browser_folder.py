"""The folder of a browser: built next to its final place, and moved there when it is complete.

A stopped build's progress stays there too, so that a build of the same inputs can resume from it.

Data are script files that each pass one JSON value to the page, because a page opened from disk may load scripts and
nothing else. JSON is ASCII, and `<` is escaped: corpus text cannot end a script or start one.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ....cache_schema.disk_and_cloud_files import free_bytes_at, sync
from ....cache_schema.errors import StoreError
from ....cache_schema.numbers_in_words import say_size
from ....train.disk.atomic_files import take_lock
from ...errors import BrowserUnwritten
from ...output.figures.page_files import FILES, script_json

NAME = "browser"
LATENT_BYTES = 4000  # of one latent on disk, about
MAKING, OLD, LOCK = f".{NAME}.making", f".{NAME}.old", f".{NAME}.lock"
TEXT, ATTENTION = "text", "attention"  # written while text is read
PAGE = Path(__file__).parent / "page"
BUILD = "{{build}}"
KINDS = {"uint8": "u1", "uint16": "u2", "uint32": "u4", "int32": "i4", "float32": "f4"}


class Folder:
    """A browser being built; `inputs` identifies everything that determines what is read."""

    def __init__(self, workplace: Path, inputs: str) -> None:
        self.path = workplace / NAME
        self.saved = workplace / f"read-{inputs}"
        """Where progress is saved: outside the browser, which is moved as a whole."""

    def write(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write data under the name by which the page asks for it."""
        return write_data(self.path, name, value)


@contextmanager
def building(home: Path, least_bytes: int, inputs: str, say: Callable[[str], None]) -> Iterator[Folder]:
    """Build a run's browser; whatever happens, the run keeps the previous one or gets the complete new one."""
    with _locked(home, say):
        workplace, old = home / MAKING, home / OLD
        folder = Folder(workplace, inputs)
        try:
            _restore_previous(home)  # if a build was killed between the two renames below
            shutil.rmtree(old, ignore_errors=True)
            leftovers = (one for one in workplace.rglob("*") if one.is_file() and folder.saved not in one.parents)
            require_space(home, least_bytes - sum(file.stat().st_size for file in leftovers))
            _clear(folder, inputs)
            (folder.path / "data").mkdir(parents=True, exist_ok=True)
            yield folder
            _require_run(home)
            if (home / NAME).exists():
                (home / NAME).rename(old)
            folder.path.rename(home / NAME)
        except (BrowserUnwritten, StoreError):
            raise
        except OSError as error:
            _require_run(home)
            hint = ". Progress is saved: the same command resumes" if _can_resume(workplace, inputs) else ""
            needed = f"It needs about {say_size(least_bytes)}{hint}"
            raise BrowserUnwritten(f"{home / NAME} cannot be written: {error.strerror or error}. {needed}") from error
        finally:
            _restore_previous(home)
            shutil.rmtree(old, ignore_errors=True)
            is_gone = not (home / LOCK).exists()  # with its run
            if is_gone or not _can_resume(workplace):  # a refused build keeps the progress of one with other inputs
                shutil.rmtree(workplace, ignore_errors=True)
            if is_gone:
                with suppress(OSError):  # only if nothing else is there
                    home.rmdir()


@contextmanager
def _locked(home: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Let one process at a time build a run's browser: two would write into one folder and clear each other's files."""
    path = home / LOCK
    try:
        file = path.open("ab")
    except OSError as error:
        raise BrowserUnwritten(f"{home / NAME} cannot be written: {error.strerror or error}") from error
    with file:
        is_alone = take_lock(file)
        if is_alone is False:
            say(f"{home}: this disk has no locks, so a second process may build the same browser")
        try:
            is_taken = is_alone is None or (is_alone and not os.path.samefile(file.fileno(), path))
        except FileNotFoundError:  # another process had it, and removed it when done
            is_taken = True
        if is_taken:
            raise BrowserUnwritten(f"another process is building {home / NAME}: wait for it to finish, or stop it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before releasing it: a process that has opened it sees that it is gone


def _require_run(home: Path) -> None:
    """Require that the run's folder is where it was when the build started: the lock moves with it."""
    if not (home / LOCK).exists():
        raise BrowserUnwritten(f"{home} was deleted or moved during the build: it gets no browser")


def _can_resume(workplace: Path, inputs: str = "*") -> bool:
    """Whether a stopped build left saved progress here, and the text that it had written."""
    return (workplace / NAME).exists() and any(workplace.glob(f"read-{inputs}/step_*"))


def _clear(folder: Folder, inputs: str) -> None:
    """Remove a stopped build's files, except those needed to resume it; progress never outlives its text."""
    workplace, path, data = folder.path.parent, folder.path, folder.path / "data"
    kept = {folder.saved, path, data, data / TEXT, data / ATTENTION} if _can_resume(workplace, inputs) else set()
    for found in (*workplace.glob("read-*"), *data.glob("*"), *path.glob("*"), *workplace.glob("*")):
        if found not in kept and found.exists():
            shutil.rmtree(found) if found.is_dir() else found.unlink()


def _restore_previous(home: Path) -> None:
    """Put the previous browser back if the new one did not take its place."""
    if (home / OLD).is_dir() and not (home / NAME).exists():
        (home / OLD).rename(home / NAME)


def require_space(home: Path, least_bytes: int) -> None:
    """Require space for the browser alone: the size of saved progress is unknown, and a build can do without it."""
    free = free_bytes_at(home)
    if free < least_bytes:
        raise BrowserUnwritten(
            f"{home / NAME} needs about {say_size(least_bytes)}, not counting progress that is saved, but only "
            f"{say_size(free)} are free there: free some space, or ask for fewer windows or examples "
            "(--set browser.windows=..., browser.sample=...), or for fewer exports"
        )


def write_page(path: Path, build: str) -> None:
    """Write the page itself; `build` keeps web browsers from using cached data of another build."""
    for file in (*sorted(PAGE.iterdir()), *sorted(FILES.iterdir())):
        (path / file.name).write_text(file.read_text(encoding="utf-8").replace(BUILD, build), encoding="utf-8")


def write_data(folder: Path, name: str, value: Mapping[str, Any]) -> Path:
    path = folder / "data" / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_data(name, value), encoding="ascii")
    return path


def as_data(name: str, value: Mapping[str, Any]) -> str:
    return f"saemill({json.dumps(name)},{script_json(value, packed)});\n"


def read_data(folder: Path, name: str) -> dict[str, Any] | None:
    """The data as written, arrays still packed; None if they cannot be read."""
    try:
        text = (folder / "data" / f"{name}.js").read_text(encoding="ascii")
        found = json.loads(text.removeprefix(f"saemill({json.dumps(name)},").removesuffix(");\n"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def saes_in(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The SAEs that a browser's run.js lists, each with its own folder; none if it is not as saemill writes it."""
    saes = about.get("saes")
    if not isinstance(saes, list) or not all(map(_has_folder, saes)):
        return []
    return saes if len({sae["label"] for sae in saes}) == len(saes) else []


def _has_folder(sae: Any) -> bool:
    label = sae.get("label") if isinstance(sae, dict) else None
    return isinstance(label, str) and label == Path(label).name and sae.get("folder") == f"sae_{label}"


def packed(array: Any) -> list[Any]:
    """An array as its kind and its base64 bytes."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"expected an array, found {type(array).__name__}")
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return [KINDS[array.dtype.name], base64.b64encode(little.data).decode()]


def unpacked(value: list[Any]) -> np.ndarray:
    """The array that was packed."""
    kind, data = value
    names = {short: name for name, short in KINDS.items()}
    return np.frombuffer(base64.b64decode(data), np.dtype(names[kind]).newbyteorder("<"))


class Pieces:
    """Arrays with a row for each window, written as they arrive, in files of `windows` windows."""

    def __init__(self, folder: Folder, name: str, windows: int) -> None:
        self._folder, self._name, self._size = folder, name, windows
        self._parts: list[dict[str, np.ndarray]] = []
        self._file = 0
        self._written: list[Path] = []  # since the last save

    def add(self, **arrays: np.ndarray) -> None:
        self._parts.append(arrays)
        self._write_full(self._size)

    def finish(self) -> None:
        self._write_full(1)

    def state(self) -> dict[str, np.ndarray]:
        """Rows that wait for their file; earlier files are synced to disk first."""
        for path in {place for file in self._written for place in (file, file.parent)}:
            sync(path)
        self._written = []
        names = self._parts[0] if self._parts else ()
        return {f"{self._name}.{name}": np.concatenate([part[name] for part in self._parts]) for name in names}

    def restore(self, windows: int, state: Mapping[str, np.ndarray]) -> None:
        self._file, start = windows // self._size, f"{self._name}."
        waiting = {name.removeprefix(start): array for name, array in state.items() if name.startswith(start)}
        self._parts = [waiting] if waiting else []

    def _write_full(self, least: int) -> None:
        if sum(len(next(iter(part.values()))) for part in self._parts) < least:
            return
        whole = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        length = len(next(iter(whole.values())))
        start = 0
        while length - start >= least:
            rows = {name: array[start : start + self._size] for name, array in whole.items()}
            self._written.append(self._folder.write(f"{self._name}/{self._file}", rows))
            self._file, start = self._file + 1, start + self._size
        self._parts = [{name: array[start:] for name, array in whole.items()}] if start < length else []
