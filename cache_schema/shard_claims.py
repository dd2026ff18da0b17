"""Who may write a shard, or the index: one writer at a time.

On a local disk a claim is a lock on one byte of one file, which the kernel releases however the
writer ends. On an object store it is an object that only the first writer can create; a living writer
renews it, and a claim whose writer died lapses after `LEASE_SECONDS`.
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
from .errors import StoreBusy, StoreUnreachable
from .layout import LOCK

CREATION = 2**40  # the number of the claim on a store's creation: no shard has it
DERIVED = 2**40 + 1  # that of the claim on index and summary
LEASE_SECONDS = 600
RENEW_SECONDS = 120
SURE = 1 / 60  # of a lease: a claim this young is not checked again; only a clock off by a lease could have taken it
HELD_TRIED, FREE_TRIED = 16, 64  # how many held, and how many free, shards a writer tries in one pass
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # errors of a disk without locks
DERIVED_SECONDS = 60  # the longest that a writer waits for another that is bringing the index up to date
PAUSE, SUMMARY_PAUSE = 4, 30  # the most seconds between two looks: while waiting for that, and for a summary


def open_claims(files: Files) -> Claims:
    return LockClaims(files) if isinstance(files, LocalFiles) else LeaseClaims(files)


def find_held(files: Files, shards: int) -> dict[int, str] | None:
    """Shards that are claimed right now, and by whom as far as can be known; None if it cannot be known."""
    if isinstance(files, LocalFiles):
        with name_failure(f"asking who writes into {files.url}"):
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
    """A lease that ends in more than two leases' time came from a wrong clock or is no number: it does not count."""
    return time.time() <= lease["until"] <= time.time() + 2 * LEASE_SECONDS


def _find_locked(path: Path, shards: int) -> dict[int, str] | None:
    """The kernel names any lock in a range, not the first, and no process for one that belongs to an open file."""
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


def no_locks(error: OSError, path: Path) -> StoreUnreachable:
    """The error for a lock that fails although nobody holds it."""
    return StoreUnreachable(
        error.errno,
        f"{error.strerror} while locking {path}: expected a disk whose file system has locks (NFS 4, Lustre with "
        "-o flock, CephFS, GPFS). Put the store on one, or into an object store",
    )


class LockClaims:
    """Byte-range locks that belong to the open file, so that two writers in one process also exclude each other."""

    if_killed = ""
    """What to add to a message about a taken claim: when it ends if its writer was killed."""

    def __init__(self, files: LocalFiles) -> None:
        self._path = files.root / LOCK
        with name_failure(f"opening {self._path}"):
            files.refuse_links(self._path)
            make_folder(self._path.parent)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)

    def take(self, number: int) -> bool:
        """Try to claim; False when another writer holds it."""
        try:
            self._lock(fcntl.F_WRLCK, number)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def keeps(self, number: int) -> bool:
        """Whether a claim is still this writer's: a writer that sleeps through a lease may have lost it."""
        return True  # the kernel takes no lock from a living process

    def release(self, number: int) -> None:
        self._lock(fcntl.F_UNLCK, number)

    def worth_trying(self, numbers: list[int]) -> list[int]:
        """All of them; where each try costs requests, a few in random order, some free and some held by others."""
        return numbers  # trying one is a single system call

    @contextmanager
    def hold_derived(self, must: bool = False, until: Callable[[], bool] | None = None) -> Iterator[bool]:
        """Wait for the claim on index and summary and hold it for a block. If the wait is given up, yield False, or
        with `must` raise StoreBusy. With `until` wait for the claim or for that, however long."""
        self._lock(fcntl.F_WRLCK, DERIVED, wait=True)
        try:
            yield True
        finally:
            self.release(DERIVED)

    def close(self) -> None:
        os.close(self._fd)

    def _lock(self, kind: int, number: int, wait: bool = False) -> None:
        try:
            self._ask_kernel(kind, number, wait)
        except (BlockingIOError, PermissionError):  # held
            raise
        except OSError as error:
            raise no_locks(error, self._path) from error

    def _ask_kernel(self, kind: int, number: int, wait: bool) -> None:
        if not hasattr(fcntl, "F_OFD_SETLK"):  # not Linux: per-process locks are the next best
            flags = fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
            fcntl.lockf(self._fd, flags, 1, number)
            return
        request = struct.pack("hhqqixxxx", kind, os.SEEK_SET, number, 1, 0)
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)


class LeaseClaims:
    """Objects created only if absent. The lease bounds how long a dead writer can hold a shard."""

    if_killed = f". If that writer was killed, run again in {LEASE_SECONDS // 60} minutes"

    def __init__(self, files: RemoteFiles) -> None:
        self._files = files
        self._owner = uuid.uuid4().hex
        self._held: dict[int, float] = {}  # number -> when it was last known to be this writer's
        self._turn = threading.Lock()  # or a renewal could bring back a claim that is just being released
        self._closed = threading.Event()
        self._renewal: threading.Thread | None = None

    def take(self, number: int) -> bool:
        asked = time.time()
        if not self._create(number):
            if not self._has_lapsed(number):
                return False
            self._files.remove(self._key(number))
            asked = 0.0  # another writer may have seen it lapse too and remove this one: `keeps` has to check
            if not self._create(number):
                return False
        with self._turn:
            self._held[number] = asked
        self._keep_renewing()
        return True

    def release(self, number: int) -> None:
        with self._turn:
            if number not in self._held:  # lost
                return
            del self._held[number]
            with suppress(StoreUnreachable):  # it lapses instead
                self._files.remove(self._key(number))

    def keeps(self, number: int) -> bool:
        with self._turn:
            now, known = time.time(), self._held.get(number)
            if known is None or 0 <= now - known < SURE * LEASE_SECONDS:
                return known is not None
            if is_mine := self._is_mine(number):
                self._held[number] = now
            else:
                del self._held[number]
            return is_mine

    def worth_trying(self, numbers: list[int]) -> list[int]:
        """Some, drawn afresh each time; some of the held ones too, as only trying one shows that its writer died.

        Near the end of a harvest thousands of workers look for what is left while thousands of shards are in work: if
        each tried each, that would be more requests than all before. A worker that has written any looks again.
        """
        claimed = set(self._files.list("claims"))
        held, free = [], []
        for number in numbers:
            (held if f"{number}.json" in claimed else free).append(number)
        return [
            number
            for some, most in ((free, FREE_TRIED), (held, HELD_TRIED))
            for number in random.sample(some, min(len(some), most))
        ]

    @contextmanager
    def hold_derived(self, must: bool = False, until: Callable[[], bool] | None = None) -> Iterator[bool]:
        """Wait for its holder, so that of many writers that end together only one reads the records.

        But for the index not for as long as a dead holder would keep it: without the claim no addition is lost, as a
        PUT is all or nothing and whoever writes last looks again. A writer that removes something must hold it, and
        looks again afterwards: one that gave up waiting may have added it back. For a summary, which takes minutes,
        wait `until` it is there: a living holder renews its claim, that of a dead one lapses.
        """
        pause, end = 0.05, time.monotonic() + DERIVED_SECONDS
        while not (is_mine := self.take(DERIVED)):
            if until() if until else time.monotonic() >= end:
                break
            time.sleep(pause * random.uniform(0.5, 1.5))  # or all waiting writers would ask at once
            pause = min(2 * pause, SUMMARY_PAUSE if until else PAUSE)
        if must and not is_mine:
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
        """Claims were released one by one; any that was not lapses."""
        self._closed.set()
        if self._renewal is not None:
            self._renewal.join()

    def _keep_renewing(self) -> None:
        if self._renewal is None:
            self._renewal = threading.Thread(target=self._renew, name="saemill-renew", daemon=True)
            self._renewal.start()

    def _renew(self) -> None:
        while not self._closed.wait(RENEW_SECONDS):
            with self._turn:
                held = tuple(self._held)
            for number in held:
                with self._turn, suppress(Exception):  # whatever a network raises: a lease outlasts several renewals
                    self._renew_one(number)

    def _renew_one(self, number: int) -> None:
        """Renew a claim, unless it was just released, or lapsed while this process slept and was taken by another."""
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
            return True
        return number not in self._held and self._is_mine(number)

    def _is_mine(self, number: int) -> bool:
        """If the answer to a successful creation was lost, the server refuses the second attempt: check the owner."""
        try:
            return self._lease(number)["owner"] == self._owner
        except (KeyError, TypeError, ValueError, RecursionError):
            return False

    def _new_lease(self) -> bytes:
        return json.dumps({"owner": self._owner, "until": time.time() + LEASE_SECONDS}).encode()

    def _lease(self, number: int) -> dict[str, Any]:
        return json.loads(self._files.read(self._key(number)))

    def _has_lapsed(self, number: int) -> bool:
        """Also true of a claim released in between, and of an unreadable one, which would hold its shard forever."""
        try:
            return not _is_running(self._lease(number))
        except (KeyError, TypeError, ValueError, RecursionError):
            return True

    @staticmethod
    def _key(number: int) -> str:
        return f"claims/{number}.json"


Claims = LockClaims | LeaseClaims
