"""Who may write a shard, or the index: one writer at a time.

On a local disk a claim is a lock on one byte of one file, which the kernel releases however the writer exits.
On an object store it is an object that only the first writer can create; a living writer renews it, and a dead
writer's claim lapses after `LEASE_SECONDS`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .disk_and_cloud_files import Files, LocalFiles, RemoteFiles, make_folder, name_failure
from .errors import AddressInvalid, StoreBusy, StoreUnreachable
from .layout import LOCK

CREATION = 2**40  # the number of the claim on a store's creation: above any shard's
DERIVED = 2**40 + 1  # the number of the claim on index and summary
LEASE_SECONDS = 600
RENEW_SECONDS = 120
FRESH = 1 / 60  # of a lease: a claim this young needs no check; only a clock off by a lease could have taken it
HELD_TRIED, FREE_TRIED = 16, 64  # held and free shards that a writer tries in one pass
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # raised on a disk without locks
DERIVED_SECONDS = 60  # the longest wait for another writer that is bringing the index up to date
PAUSE, SUMMARY_PAUSE = 4, 30  # longest seconds between two attempts, waiting for the index and for a summary


def open_claims(files: Files) -> Claims:
    return LockClaims(files) if isinstance(files, LocalFiles) else LeaseClaims(files)


def find_held(files: Files, shards: int) -> dict[int, str] | None:
    """Shards that are claimed right now, with their writers as far as known; None if claims cannot be seen."""
    if isinstance(files, LocalFiles):
        with name_failure(f"looking for the writers of {files.url}"):
            return _find_locked(files.root / LOCK, shards)
    names = [name for name in files.list("claims") if name.removesuffix(".json").isdecimal()]
    held = {}
    for number in sorted(int(name.removesuffix(".json")) for name in names):
        with suppress(KeyError, TypeError, ValueError, RecursionError):  # released in between, or not a lease
            lease = json.loads(files.read(f"claims/{number}.json"))
            if number < shards and _is_running(lease):
                held[number] = f"writer {str(lease['owner'])[:8]}"
    return held


def _is_running(lease: Any) -> bool:
    """Whether a lease is valid; one that ends more than two leases from now is not, but came from a wrong clock."""
    return time.time() <= lease["until"] <= time.time() + 2 * LEASE_SECONDS


def _find_locked(path: Path, shards: int) -> dict[int, str] | None:
    """Ask the kernel, which reports any one lock in a range, not the first, and not the process that holds it."""
    if not hasattr(fcntl, "F_OFD_GETLK"):
        return None
    held: dict[int, str] = {}
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return {}
    try:
        unknown = [(0, shards)]
        while unknown:
            start, stop = unknown.pop()
            if start >= stop:
                continue
            request = struct.pack("hhqqixxxx", fcntl.F_WRLCK, os.SEEK_SET, start, stop - start, 0)
            kind, _, first, length, _ = struct.unpack("hhqqixxxx", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request))
            if kind == fcntl.F_UNLCK:
                continue
            last = first + length if length else stop
            held |= dict.fromkeys(range(max(first, start), min(last, stop)), "writers on this disk")
            unknown += [(start, first), (last, stop)]
        return held
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return None
        raise
    finally:
        os.close(fd)


def locking_failed(error: OSError, path: Path) -> StoreUnreachable:
    """The error for a disk that does not support locks."""
    return StoreUnreachable(
        error.errno,
        f"{error.strerror} while locking {path}: expected a disk whose file system has locks (NFS 4, Lustre with "
        "-o flock, CephFS, GPFS). Put the store on one, or into an object store",
    )


class LockClaims:
    """Byte-range locks that belong to the open file, so that two writers in one process also exclude each other."""

    if_killed = ""
    """For messages about a held claim: when it becomes free if its writer was killed."""

    def __init__(self, files: LocalFiles) -> None:
        self._path = files.root / LOCK
        with name_failure(f"opening {self._path}"):
            files.refuse_links(self._path)
            make_folder(self._path.parent)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)

    def take(self, number: int) -> bool:
        """Try to claim; False if another writer holds it."""
        try:
            self._lock(fcntl.F_WRLCK, number)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def keeps(self, number: int) -> bool:
        """Whether a claim is still held: a writer that was suspended for longer than a lease may have lost it."""
        return True  # a living process keeps its locks

    def release(self, number: int) -> None:
        self._lock(fcntl.F_UNLCK, number)

    def worth_trying(self, numbers: list[int]) -> list[int]:
        """All of them; if each attempt costs requests, a random few, some free and some held by others."""
        return numbers  # an attempt is a single system call

    @contextmanager
    def hold_derived(self, is_required: bool = False, until: Callable[[], bool] | None = None) -> Iterator[bool]:
        """Wait for the claim on index and summary and hold it during a block. After too long a wait, yield False, or
        with `is_required` raise StoreBusy. With `until`, wait for the claim or for `until()`, however long."""
        self._lock(fcntl.F_WRLCK, DERIVED, wait=True)
        try:
            yield True
        finally:
            self.release(DERIVED)

    def close(self) -> None:
        os.close(self._fd)

    def _lock(self, kind: int, number: int, wait: bool = False) -> None:
        try:
            if hasattr(fcntl, "F_OFD_SETLK"):
                request = struct.pack("hhqqixxxx", kind, os.SEEK_SET, number, 1, 0)
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)
            else:  # not Linux: per-process locks are the next best
                flags = fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
                fcntl.lockf(self._fd, flags, 1, number)
        except (BlockingIOError, PermissionError):  # held
            raise
        except OSError as error:
            raise locking_failed(error, self._path) from error


class LeaseClaims:
    """Objects created only if absent. The lease bounds how long a dead writer can hold a shard."""

    if_killed = f". If that writer was killed, run again in {LEASE_SECONDS // 60} minutes"

    def __init__(self, files: RemoteFiles) -> None:
        self._files = files
        self._owner = uuid.uuid4().hex
        self._held: dict[int, float] = {}  # number -> when it was last known to be held
        self._is_exclusive = False  # known only after a claim was created and its second creation refused
        self._lock = threading.Lock()  # or a renewal could bring back a claim that is just being released
        self._closed = threading.Event()
        self._renewal: threading.Thread | None = None

    def take(self, number: int) -> bool:
        asked = time.time()
        if not self._create(number):
            if not self._has_lapsed(number):
                return False
            self._files.remove(self._key(number))
            asked = 0.0  # another writer may have seen it lapse too and remove this one: make `keeps` check
            if not self._create(number):
                return False
        with self._lock:
            self._held[number] = asked
        self._keep_renewing()
        return True

    def release(self, number: int) -> None:
        with self._lock:
            if number not in self._held:  # lost
                return
            del self._held[number]
            with suppress(StoreUnreachable):  # it lapses instead
                self._files.remove(self._key(number))

    def keeps(self, number: int) -> bool:
        with self._lock:
            now, known = time.time(), self._held.get(number)
            if known is None or 0 <= now - known < FRESH * LEASE_SECONDS:
                return known is not None
            if is_mine := self._is_mine(number):
                self._held[number] = now
            else:
                del self._held[number]
            return is_mine

    def worth_trying(self, numbers: list[int]) -> list[int]:
        """A random sample, which includes held ones: only an attempt shows that their writer died.

        Near the end of a harvest thousands of workers look for work while thousands of shards are being written: if
        each tried all, they would make more requests than the harvest before. A worker that wrote any tries again.
        """
        claimed = set(self._files.list("claims"))
        held, free = [], []
        for number in numbers:
            (held if f"{number}.json" in claimed else free).append(number)
        return [
            number
            for group, most in ((free, FREE_TRIED), (held, HELD_TRIED))
            for number in random.sample(group, min(len(group), most))
        ]

    @contextmanager
    def hold_derived(self, is_required: bool = False, until: Callable[[], bool] | None = None) -> Iterator[bool]:
        """Wait for the holder, so that of many writers that finish together only one reads the records.

        For the index the wait is shorter than a dead holder's lease: without the claim no addition is lost, because a
        PUT is all or nothing and the last to write checks again. A writer that removes something must hold the claim,
        and check again afterwards: one that gave up waiting may have added it back. For a summary, which takes minutes,
        wait `until` it exists: a living holder renews its claim, and a dead one's lapses.
        """
        pause, end = 0.05, time.monotonic() + DERIVED_SECONDS
        while not (is_mine := self.take(DERIVED)):
            if until() if until else time.monotonic() >= end:
                break
            time.sleep(pause * random.uniform(0.5, 1.5))  # random, so that waiting writers do not all ask at once
            pause = min(2 * pause, SUMMARY_PAUSE if until else PAUSE)
        if is_required and not is_mine:
            raise StoreBusy(
                f"another writer is bringing the index of {self._files.url} up to date. Wait for it, then try again"
                f"{self.if_killed}"
            )
        try:
            yield is_mine
        finally:
            if is_mine:
                self.release(DERIVED)

    def close(self) -> None:
        """Stop renewing; a claim that was not released lapses."""
        self._closed.set()
        if self._renewal is not None:
            self._renewal.join()

    def _keep_renewing(self) -> None:
        if self._renewal is None:
            self._renewal = threading.Thread(target=self._renew, name="saemill-renew", daemon=True)
            self._renewal.start()

    def _renew(self) -> None:
        while not self._closed.wait(RENEW_SECONDS):
            with self._lock:
                held = tuple(self._held)
            for number in held:
                with self._lock, suppress(Exception):  # whatever a network raises: a lease outlasts several renewals
                    self._renew_one(number)

    def _renew_one(self, number: int) -> None:
        """Renew a claim, unless it was just released, or taken by another after this process was suspended."""
        asked = time.time()
        if number not in self._held:
            return
        if self._lease(number).get("owner") == self._owner:
            self._files.replace(self._key(number), self._new_lease())
            self._held[number] = asked
        else:
            del self._held[number]

    def _create(self, number: int) -> bool:
        if self._files.create(self._key(number), self._new_lease()):
            self._require_exclusive(number)
            return True
        return number not in self._held and self._is_mine(number)

    def _require_exclusive(self, number: int) -> None:
        """Try, once per writer, to create its own claim again. Some servers and older libraries ignore the condition
        and overwrite what exists: every writer would get every claim, and none would notice.

        More than once, because another writer that saw an earlier claim lapse may remove this one in between."""
        if not self._is_exclusive and all(self._files.create(self._key(number), self._new_lease()) for _ in range(3)):
            self._files.remove(self._key(number))
            raise AddressInvalid(
                f"{self._files.url}: expected storage that refuses to create an object that exists, which keeps two "
                "writers off one shard, but it overwrote one. Update the library (s3fs 2024.12 with aiobotocore "
                "2.14, gcsfs 2024.12, adlfs 2024.12, or newer); if that does not help, the server lacks conditional "
                "writes: write the store to a disk and copy it"
            )
        self._is_exclusive = True

    def _is_mine(self, number: int) -> bool:
        """Whether this writer owns the claim: if the answer to its creation was lost, the retry was refused."""
        try:
            return self._lease(number)["owner"] == self._owner
        except (KeyError, TypeError, ValueError, RecursionError):
            return False

    def _new_lease(self) -> bytes:
        return json.dumps({"owner": self._owner, "until": time.time() + LEASE_SECONDS}).encode()

    def _lease(self, number: int) -> dict[str, Any]:
        return json.loads(self._files.read(self._key(number)))

    def _has_lapsed(self, number: int) -> bool:
        """Also true of a claim released in between, and of an unreadable one, which would otherwise never lapse."""
        try:
            return not _is_running(self._lease(number))
        except (KeyError, TypeError, ValueError, RecursionError):
            return True

    @staticmethod
    def _key(number: int) -> str:
        return f"claims/{number}.json"


Claims = LockClaims | LeaseClaims
