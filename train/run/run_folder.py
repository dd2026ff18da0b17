"""The folder of a run, and all code that knows its layout.

runs/run_4/config.json          the configuration, and where the run started and resumed: cache id, versions, device
runs/run_4/metrics.jsonl        one line per logged step and SAE
runs/run_4/checkpoints/step_*/  the last two; the last alone if the run finished
runs/run_4/topk_k32/            an SAE: cfg.json, sae_weights.safetensors (once training is done)
runs/run_4/result.json          the results (only if the run finished)
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...cache_schema.disk_and_cloud_files import make_folder, sync
from ...cache_schema.strict_json import flatten
from ...cache_schema.users_own_files import EXTRA, digest_of_users_files
from ..disk.atomic_files import encode_line, read_json, take_lock, write_json
from ..errors import ConfigInvalid, RunMissing, RunNotWritten, RunTaken, resume_command

RUNS = "runs"
"""Where runs are kept by default."""
RUN_ID = "run_id"  # in the provenance of config.json
LOST = "lost_bytes_of_metrics"  # in the provenance of a resumption
LEFTOVER_SECONDS = 60.0  # from this age an empty folder is a leftover, not a run that is just starting
LONGEST_NAME = 255  # bytes that a file system allows in a name
_PACKAGES = ("saemill", "torch", "numpy", "safetensors", "accelerate", "zarr")


class RunFolder:
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = own_path(path)

    @classmethod
    def create(cls, root: str | os.PathLike[str], name: str | None, like: str | None = None) -> RunFolder:
        """Create a folder of this name. Without a name, the first free one of `like`, like_2, like_3, ... or of run_1,
        run_2, ..."""
        root = Path(root)
        with _name_refusal(root):
            make_folder(root)
        if name is not None:
            cls.require_free(root, name)
            try:
                with _name_refusal(root):
                    (root / name).mkdir()
            except FileExistsError:
                cls.require_free(root, name)  # another run may have just taken it
            return cls(root / name)
        numbers = itertools.count(1)
        while True:  # mkdir decides, so that runs that start together get different names
            number = next(numbers)
            path = root / (like if like and number == 1 else f"{like or 'run'}_{number}")
            with suppress(FileExistsError), _name_refusal(root):
                path.mkdir()
                return cls(path)

    @classmethod
    def require_free(cls, root: str | os.PathLike[str], name: str) -> None:
        """Refuse a name that is invalid or taken."""
        if name in ("", ".", "..") or "/" in name or len(os.fsencode(name)) > LONGEST_NAME:
            raise ConfigInvalid(
                f"--name: expected the name of a folder in {root}, of at most {LONGEST_NAME} bytes and without a /, "
                f"found {name[:LONGEST_NAME]!r}: choose another"
            )
        path, taken, remedy = Path(root, name), cls(Path(root, name)), ""
        if not os.path.lexists(path):
            return
        # A full disk leaves an empty folder behind; a run that is starting has one for a moment.
        if path.is_dir() and not any(path.iterdir()) and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
            return
        if taken.is_finished:
            remedy = f", or evaluate it: {shlex.join(['sae-eval', str(taken.path)])}"
        elif is_run(taken.path):
            remedy = f", or resume it: {resume_command(taken.path)}"
        raise RunTaken(f"{path} already exists: choose another --name{remedy}")

    @classmethod
    def open(cls, root: str | os.PathLike[str], name: str) -> RunFolder:
        """Open a run by its name under `root`, or by its path."""
        for path in places_of(name, root):
            if is_run(path):
                return cls(path)
        known = ", ".join(run_names(root))
        held = f"which has {known}: give one of these" if known else "which has no runs: train one without --resume"
        raise RunMissing(f"no run {name!r} in {root}, {held}, or set --out to the folder where the run is kept")

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def has_steps(self) -> bool:
        """Whether any step is logged; the first one always is."""
        return self.metrics.is_file() and self.metrics.stat().st_size > 0

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write config.json, with an id for the run: an earlier run may have had the same name."""
        self.write_config({**config, "provenance": {**config["provenance"], RUN_ID: uuid.uuid4().hex}})

    @property
    def run_id(self) -> str:
        """Empty for runs from before run ids."""
        return str((self.read_config().get("provenance") or {}).get(RUN_ID, ""))

    def write_config(self, config: Mapping[str, Any]) -> None:
        with name_failure(self.path, "config.json"):
            write_json(self.path / "config.json", config)
            sync(self.path.parent)

    def read_config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    def record_resumption(self, here: Mapping[str, Any]) -> list[str]:
        """Append the provenance of a resumption to config.json; return what has changed since before, in words."""
        config = self.read_config()
        before = [config.get("provenance") or {}, *config.get("resumed", [])]
        self.write_config(config | {"resumed": [*before[1:], dict(here)]})
        old, new = flatten(before[-1]), flatten(here)
        # Earlier runs did not record all of the hardware.
        old = {key: value for key, value in new.items() if key.startswith("hardware.")} | old
        keys = [key for key in dict.fromkeys([*new, *old]) if old.get(key) != new.get(key)]
        keys = [key for key in keys if key not in ("date", "command", RUN_ID, LOST)]
        return [f"{key.rpartition('.')[2]} {new.get(key)} (before: {old.get(key)})" for key in keys]

    def write_result(self, result: Mapping[str, Any]) -> None:
        with name_failure(self.path, "result.json"):
            write_json(self.path / "result.json", result)

    @property
    def is_finished(self) -> bool:
        return (self.path / "result.json").exists()


class MetricsLog:
    """metrics.jsonl: appended to while training, cut back to the checkpoint on resume. Only one launch trains a run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lost_bytes = 0  # that the checkpoint expects before its step
        with self._name_failure():
            self._file = path.open("ab")
        self.is_locked = take_lock(self._file)
        if self.is_locked is None:
            self._file.close()
            raise RunTaken(f"another process is training {path.parent}: wait for it to finish, or stop it")

    def require_ours(self) -> None:
        """Refuse to continue if the run's folder was removed or replaced: another run may be there now."""
        with self._name_failure():
            try:
                if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                    return
                found = "another file of that name"
            except FileNotFoundError:
                found = "none"
        raise RunMissing(
            f"expected {self._path} to be the log that this process writes, found {found}: the folder was removed, "
            "moved or replaced while the run trained, so nothing more is written there. If it was moved, resume it at "
            "its new place; otherwise train it again under another --name"
        )

    def write(self, values: Mapping[str, Any]) -> None:
        with self._name_failure():
            self._file.write(encode_line(values))
            self._file.flush()

    @property
    def size(self) -> int:
        return self._file.tell()

    def sync(self) -> None:
        """Flush the file and its directory entry to disk: a checkpoint relies on the lines before it."""
        self.require_ours()
        with self._name_failure():
            os.fsync(self._file.fileno())
            sync(self._path.parent)

    def cut(self, size: int) -> None:
        """Drop the lines after a checkpoint, whose steps are taken again.

        If the log is shorter because it was lost or partly copied, keep its whole lines instead of padding with zeros.
        """
        kept = size
        if size > self._file.seek(0, os.SEEK_END):
            kept = self._path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(kept)
        self._file.seek(kept)
        self.lost_bytes = size - kept

    def close(self) -> None:
        with self._name_failure():
            self._file.close()

    def _name_failure(self) -> AbstractContextManager[None]:
        return name_failure(self._path.parent, self._path.name)


@contextmanager
def name_failure(folder: Path, what: str) -> Iterator[None]:
    """Report a failed write in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunNotWritten(
            f"{what} could not be written to {folder} ({error}). Make room there, or fix the problem. Everything saved "
            f"before is intact: if there is a checkpoint, resume with: {resume_command(folder)}"
        ) from error


def places_of(name: str | os.PathLike[str], root: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Where to look for a name: first under the folder of runs, then as a path of its own."""
    return Path(root) / name, Path(name)


def own_path(path: str | os.PathLike[str]) -> Path:
    """A path by which every command finds this run: they look under `runs` first, where another may have its name."""
    path = Path(path)
    return path.absolute() if len(path.parts) < 2 or Path(RUNS, path).exists() else path


def is_run(folder: Path) -> bool:
    """Whether a run was started there, by the content of its config.json: models and other tools have such a file too.
    An unreadable one counts as a run's, so that opening the run reports the problem."""
    file = folder / "config.json"
    try:
        return os.path.isfile(file) and {"cache", "saes"} <= read_json(file).keys()
    except (ConfigInvalid, OSError):
        return True


def run_names(root: str | os.PathLike[str]) -> list[str]:
    return sorted(path.parent.name for path in Path(root).glob("*/config.json") if is_run(path.parent))


def provenance(hardware: Mapping[str, Any]) -> dict[str, Any]:
    """Where a run comes from; never part of its identity."""
    own, program = digest_of_users_files(), Path(sys.argv[0]).name
    # The saemill command that was typed, which may have called others.
    command = without_password(shlex.join([program, *sys.argv[1:]])) if program.startswith("sae-") else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "git": _git_state(Path(__file__)),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "hardware": dict(hardware),
        **({} if own is None else {EXTRA: own}),
    }


def without_password(text: str) -> str:
    """Remove passwords from URLs (https://name:password@host): run folders get shared."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


@contextmanager
def _name_refusal(root: str | os.PathLike[str]) -> Iterator[None]:
    """Report a folder that cannot be created, but let FileExistsError pass if only the name is taken."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileExistsError) and Path(root).is_dir():
            raise
        raise ConfigInvalid(f"cannot keep runs in {os.fspath(root)} ({error.strerror}): choose another --out") from None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(file: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the repository that tracks a source file; None for an untracked one, such as a package
    installed in a project's .venv."""
    commands = (["ls-files", "--error-unmatch", file.name], ["rev-parse", "HEAD"], ["status", "--porcelain"])
    try:
        _, commit, changes = (
            subprocess.run(["git", "-C", str(file.parent), *words], capture_output=True, check=True).stdout
            for words in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.decode().strip(), "is_dirty": bool(changes.strip())}


def cache_of(folder: RunFolder) -> tuple[str, str]:
    """URL and cache id of the store that a run trains on."""
    cache = folder.read_config().get("cache")
    if not isinstance(cache, dict) or not all(isinstance(cache.get(key), str) for key in ("url", "cache_id")):
        raise ConfigInvalid(
            f"expected {folder.path / 'config.json'} to name the run's store, found no url and cache_id: copy the "
            "folder again"
        )
    return cache["url"], cache["cache_id"]
