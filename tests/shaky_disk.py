"""A disk that stops, fails or forgets: a layer between this process and one folder of the real disk.

It counts the calls of `os` that change or flush something there. From the n-th on, `die` lets no further call through,
like a killed process; `fail` answers that one, or all from then on, with an error number. `power_cut` takes back what
POSIX does not promise: unflushed bytes of files, and unflushed names in folders. What is taken back is drawn for each
name, independently of the order of threads.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings

CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CALLS = ("open", "write", "fsync", "replace", "rename", "unlink", "mkdir")


class Killed(BaseException):
    """The process is dead: only the kernel cleans up after this."""


class ShakyDisk:
    """Patches `os` while it is installed; affects only paths under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.faults: Counter[str] = Counter()
        self._left: int | None = None
        self._then: Callable[[], BaseException] = Killed
        self._kind = ""
        self._sticks = True
        self._bytes: dict[int, bytes] = {}  # inode -> a file's flushed content
        self._names: dict[int, dict[str, int]] = {}  # inode -> a folder's flushed names and their inodes
        self._lock = threading.RLock()
        self._real = {name: getattr(os, name) for name in CALLS}

    def install(self) -> None:
        for name in self._real:
            setattr(os, name, getattr(self, f"_{name}"))

    def remove(self) -> None:
        for name, call in self._real.items():
            setattr(os, name, call)

    def die(self, at: int) -> None:
        self._left, self._then, self._sticks, self._kind = at, Killed, True, "killed"

    def fail(self, number: int, at: int, sticks: bool) -> None:
        self._left, self._then, self._sticks = at, lambda: OSError(number, os.strerror(number)), sticks
        self._kind = errno.errorcode[number]

    def be_well(self) -> None:
        self._left = None

    def flush_all(self) -> None:
        """Treat the current content as flushed."""
        self._bytes.clear()
        self._names.clear()
        for folder, _, files in os.walk(self.root):
            self._remember(folder)
            for name in files:
                self._remember(os.path.join(folder, name))

    def power_cut(self, seed: int) -> None:
        """After a death: unflushed content survives whole, in part, or not at all."""
        self.faults["power cut"] += 1
        self._cut_folder(self.root, seed)
        self.flush_all()

    def _cut_folder(self, folder: str, seed: int) -> None:
        now = {entry.name: entry.inode() for entry in os.scandir(folder)}
        before = self._names.get(os.stat(folder).st_ino, {})
        for name in sorted(now | before):
            path = os.path.join(folder, name)
            draw = random.Random(f"{seed} {os.path.relpath(path, self.root)}")
            if now.get(name) != before.get(name) and draw.random() < 0.5:
                if name in now:
                    shutil.rmtree(path) if os.path.isdir(path) else self._real["unlink"](path)
                if name in before:
                    self._bring_back(path, before[name])
            elif name in now:
                self._cut_folder(path, seed) if os.path.isdir(path) else self._cut_file(path, now[name], draw)

    def _cut_file(self, path: str, inode: int, draw: random.Random) -> None:
        """Keep the flushed part that is still there: an appended log loses only its end."""
        now, before = Path(path).read_bytes(), self._bytes.get(inode, b"")
        if now != before:
            pairs = zip(now, before, strict=False)
            kept = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(now), len(before)))
            cut, zeros = now[: draw.randint(kept, len(now))], now[:kept] + bytes(len(now) - kept)
            Path(path).write_bytes(draw.choice([now, cut, before, zeros]))

    def _bring_back(self, path: str, inode: int) -> None:
        if inode not in self._names:
            Path(path).write_bytes(self._bytes.get(inode, b""))
            return
        self._real["mkdir"](path)
        for name, child in self._names[inode].items():
            self._bring_back(os.path.join(path, name), child)

    def _remember(self, path: str) -> None:
        inode = os.stat(path).st_ino
        with self._lock:
            if os.path.isdir(path):
                self._names[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
            else:
                self._bytes[inode] = Path(path).read_bytes()

    def _count(self, path: Any) -> bool:
        """Count a call, and let it fail if its turn has come; return whether its path is under the root."""
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(self.root):
            return False
        with self._lock:
            if self._left is not None:
                self._left -= 1
                if self._left == 0 or (self._left < 0 and self._sticks):
                    self.faults[self._kind] += self._left == 0 or self._then is not Killed  # a process dies once
                    raise self._then()
        return True

    def _open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & CHANGES:
            self._count(path)
        return self._real["open"](path, flags, *args, **kwargs)

    def _write(self, fd: int, data: Any) -> int:
        if self._count(os.readlink(f"/proc/self/fd/{fd}")):
            self.faults["short write"] += len(data) > 1
            data = memoryview(data)[: max(1, len(data) // 2)]  # as write(2) may
        return self._real["write"](fd, data)

    def _fsync(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if self._count(path):
            self._remember(path)
        self._real["fsync"](fd)

    def _replace(self, source: Any, target: Any, **kwargs: Any) -> None:
        self._count(target)
        self._real["replace"](source, target, **kwargs)

    def _rename(self, source: Any, target: Any, **kwargs: Any) -> None:
        self._count(target)
        self._real["rename"](source, target, **kwargs)

    def _unlink(self, path: Any, **kwargs: Any) -> None:
        self._count(path)
        self._real["unlink"](path, **kwargs)

    def _mkdir(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self._count(path)
        self._real["mkdir"](path, *args, **kwargs)


def course(examples: int, steps: int, derandomize: bool) -> settings:
    """Settings for a state machine on such a disk."""
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=derandomize,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if derandomize else [Phase.generate, Phase.shrink],
    )
