"""The folder of a browser: built next to its final place, and moved there when it is complete.

What a stopped build had read stays there too, so that a build of the same inputs can continue from it.

Data lie in script files that hand one JSON value to the page, because a page opened from disk may add scripts and
may read nothing else. JSON is ASCII, and `<` is escaped: corpus text cannot end a script or begin one.
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
from ...output.figures.records import FILES, script_json

NAME = "browser"
LATENT_BYTES = 4000  # on disk, about
MAKING, OLD, LOCK = f".{NAME}.making", f".{NAME}.old", f".{NAME}.lock"
TEXT, ATTENTION = "text", "attention"  # written while text is read
PAGE = Path(__file__).parent / "page"
BUILD = "{{build}}"
KINDS = {"uint8": "u1", "uint16": "u2", "uint32": "u4", "int32": "i4", "float32": "f4"}


class Folder:
    """A browser being built; `inputs` names everything that decides what is read."""

    def __init__(self, made_in: Path, inputs: str) -> None:
        self.path = made_in / NAME
        self.saved = made_in / f"read-{inputs}"
        """Where what was read so far is saved: outside the browser, which is moved as a whole."""

    def write(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write data under the name by which the page asks for it."""
        return write_data(self.path, name, value)


@contextmanager
def making(home: Path, least_bytes: int, inputs: str, say: Callable[[str], None]) -> Iterator[Folder]:
    """Build the browser of a run; whatever happens, the run has the previous one or the complete new one."""
    with _alone(home, say):
        made_in, old = home / MAKING, home / OLD
        folder = Folder(made_in, inputs)
        try:
            _put_back(home)  # a build was interrupted between its two last lines
            shutil.rmtree(old, ignore_errors=True)
            left = (file for file in made_in.rglob("*") if file.is_file() and folder.saved not in file.parents)
            require_space(home, least_bytes - sum(file.stat().st_size for file in left))
            _clear(folder, inputs)
            (folder.path / "data").mkdir(parents=True, exist_ok=True)
            yield folder
            _require_there(home)
            if (home / NAME).exists():
                (home / NAME).rename(old)
            folder.path.rename(home / NAME)
        except (BrowserUnwritten, StoreError):
            raise
        except OSError as error:
            _require_there(home)
            goes_on = (
                ". What was read is kept: the same command continues from there" if _goes_on(made_in, inputs) else ""
            )
            raise BrowserUnwritten(
                f"{home / NAME} cannot be written: {error.strerror or error}. It needs about {say_size(least_bytes)}"
                f"{goes_on}"
            ) from error
        finally:
            _put_back(home)
            shutil.rmtree(old, ignore_errors=True)
            is_gone = not (home / LOCK).exists()  # with its run
            if is_gone or not _goes_on(made_in):  # a refused build leaves what one of other inputs saved
                shutil.rmtree(made_in, ignore_errors=True)
            if is_gone:
                with suppress(OSError):  # only if nothing else is there
                    home.rmdir()


@contextmanager
def _alone(home: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Let one process at a time build a run's browser: two would write into one folder and clear each other's files."""
    path = home / LOCK
    try:
        file = path.open("ab")
    except OSError as error:
        raise BrowserUnwritten(f"{home / NAME} cannot be written: {error.strerror or error}") from error
    with file:
        is_alone = take_lock(file)
        if is_alone is False:
            say(f"{home}: no locks on this disk, so nothing keeps a second process from building this browser")
        try:
            is_taken = is_alone is None or (is_alone and not os.path.samefile(file.fileno(), path))
        except FileNotFoundError:  # another process had it, and removed it when done
            is_taken = True
        if is_taken:
            raise BrowserUnwritten(f"another process is building {home / NAME}: wait until it ends, or stop it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before it is released: whoever opened it meanwhile finds it gone


def _require_there(home: Path) -> None:
    """Require that the run still is where it was when the build began: its lock goes with it."""
    if not (home / LOCK).exists():
        raise BrowserUnwritten(f"{home} was removed or moved meanwhile: no browser is made for it")


def _goes_on(made_in: Path, inputs: str = "*") -> bool:
    """Whether a stopped build left a save here, and the text that it had written."""
    return (made_in / NAME).exists() and any(made_in.glob(f"read-{inputs}/step_*"))


def _clear(folder: Folder, inputs: str) -> None:
    """Remove what a stopped build left, except what one of the same inputs needs; no save outlives its text."""
    made_in, path, data = folder.path.parent, folder.path, folder.path / "data"
    stays = {folder.saved, path, data, data / TEXT, data / ATTENTION} if _goes_on(made_in, inputs) else set()
    for left in (*made_in.glob("read-*"), *data.glob("*"), *path.glob("*"), *made_in.glob("*")):
        if left not in stays and left.exists():
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _put_back(home: Path) -> None:
    """Put the previous browser back if the new one did not take its place."""
    if (home / OLD).is_dir() and not (home / NAME).exists():
        (home / OLD).rename(home / NAME)


def require_space(home: Path, least_bytes: int) -> None:
    """Require space for the browser alone: saves depend on how much fires, and a disk too full for them may hold it."""
    free = free_bytes_at(home)
    if free < least_bytes:
        raise BrowserUnwritten(
            f"{home / NAME} needs about {say_size(least_bytes)}, not counting what is saved on the way, but "
            f"{say_size(free)} are free there: free some, or ask for fewer windows or examples "
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
    """What was written, arrays still packed; None if nothing can be read."""
    try:
        text = (folder / "data" / f"{name}.js").read_text(encoding="ascii")
        found = json.loads(text.removeprefix(f"saemill({json.dumps(name)},").removesuffix(");\n"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def saes_in(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The SAEs that a browser's run.js lists, each in its own folder; none if it was not written here."""
    saes = about.get("saes")
    if not isinstance(saes, list) or not all(map(_has_folder, saes)):
        return []
    return saes if len({sae["label"] for sae in saes}) == len(saes) else []


def _has_folder(sae: Any) -> bool:
    label = sae.get("label") if isinstance(sae, dict) else None
    return isinstance(label, str) and label == Path(label).name and sae.get("folder") == f"sae_{label}"


def packed(array: Any) -> list[Any]:
    """An array as its kind and its bytes."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"expected an array, found {type(array).__name__}")
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return [KINDS[array.dtype.name], base64.b64encode(little.data).decode()]


def unpacked(value: list[Any]) -> np.ndarray:
    """An array from its kind and its bytes."""
    kind, data = value
    names = {short: name for name, short in KINDS.items()}
    return np.frombuffer(base64.b64decode(data), np.dtype(names[kind]).newbyteorder("<"))


class Pieces:
    """Arrays with a row for each window, written as they come, in files of `windows` windows."""

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
        """Rows that wait for their file; earlier files have been synced to disk."""
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
