"""The bytes under the keys of a store: on a local disk, or at any fsspec URL.

Two classes with the same methods. A key is a path relative to the store. `write` is durable once `settle` has
returned, `replace` is all or nothing, and a missing key raises `KeyError`. Every other failure of a disk or a
network raises `StoreUnreachable`.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import fsspec
import google_crc32c
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from .errors import AddressInvalid, StoreError, StoreFull, StoreUnreachable

PAGE = 1000  # the most names that one listing request returns
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EXISTS, CONFLICT = 412, 409  # S3's refusals to create an object: it exists; it is being removed right now
CONFLICT_PAUSES = (0.1, 0.3, 1.0)  # seconds between attempts
_BLOCK = 2**20  # bytes checksummed at a time, right after reading, while they are in the processor's cache


def open_files(url: str | os.PathLike[str]) -> Files:
    """Local paths get plain file calls; everything else goes through fsspec."""
    # otherwise s3fs asks for each object's size first, to fetch it in several pieces at once
    options = {"max_concurrency": 1} if os.fspath(url).startswith("s3://") else {}
    try:
        if not os.fspath(url):  # fsspec would take the current folder
            raise ValueError("an empty name")
        fs, path = fsspec.core.url_to_fs(os.fspath(url), **options)
    except (ImportError, ValueError) as error:
        raise AddressInvalid(
            f"{os.fspath(url)} cannot be opened ({error}). Expected a folder, or an address such as s3://bucket/store "
            "(pip install s3fs), gs://bucket/store (pip install gcsfs) or another that fsspec knows"
        ) from None
    if isinstance(fs, LocalFileSystem):
        return LocalFiles(Path(path))
    lists_in_order = hasattr(fs, "call_s3") and not path.split("/")[0].endswith(("--x-s3", "--xa-s3"))
    return (S3Files if lists_in_order else RemoteFiles)(fs, path, os.fspath(url))


def require_folder(path: Path, asked: str) -> None:
    """Require a path that is, or can become, a folder writable by this process; creates nothing."""
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not there.exists():
        raise AddressInvalid(
            f"{asked}: {there} is a link to {os.readlink(there)}, which is missing. Make that folder, or give another"
        )
    if not there.is_dir():
        raise AddressInvalid(f"{asked}: expected a folder or a place for one, but {there} is a file. Give another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise AddressInvalid(f"{asked}: {there} is not writable. Change its permissions, or give another")


def read_if_there(files: Files, key: str) -> bytes | None:
    """The file's bytes, or None if it does not exist. Also used to check for a file: this is one request, whereas
    `exists` on an object store costs a listing as well."""
    try:
        return files.read(key)
    except KeyError:
        return None


class LocalFiles:
    """A folder on a local disk."""

    list_beyond = 2000
    """With more names than this to look for, list the folder instead of asking for each name: on a shared disk each is
    a request, while a listing brings thousands at once. On a local disk both take 1 to 2.5 us a name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def read(self, key: str) -> bytes:
        with name_failure(f"reading {key} of {self.url}"):
            try:
                return _read_fresh(self.root / key)
            except (FileNotFoundError, NotADirectoryError):
                raise KeyError(key) from None

    def read_into(self, key: str, body: np.ndarray, tail: np.ndarray) -> tuple[int, int]:
        """Read a file into `body`, then `tail` (both uint8); return the file's size and the crc32c of `body`."""
        with name_failure(f"reading {key} of {self.url}"):
            try:
                fd = os.open(self.root / key, os.O_RDONLY)
            except (FileNotFoundError, NotADirectoryError):
                raise KeyError(key) from None
            try:
                return os.fstat(fd).st_size, _read_checksummed(fd, body, tail)
            finally:
                os.close(fd)

    def size(self, key: str) -> int:
        with name_failure(f"asking for the size of {key} of {self.url}"):
            return (self.root / key).stat().st_size

    def exists(self, key: str) -> bool:
        with name_failure(f"looking for {key} of {self.url}"):
            return _is_there(self.root / key)

    def which_exist(self, folder: str, names: Sequence[str]) -> list[str]:
        """The subset of `names` found in the folder, in the same order.

        One call per name: a listing would read every name in a folder that may hold a million. `os.access` is the
        fastest, but returns False on any error, so one of the missing names is checked again with `os.stat`."""
        with name_failure(f"looking into {folder} of {self.url}"):
            try:
                fd = os.open(self.root / folder, os.O_RDONLY)
            except FileNotFoundError:
                return []
            try:
                found = [name for name in names if os.access(name, os.F_OK, dir_fd=fd)]
                if len(found) < len(names):
                    _is_there(next(iter(set(names).difference(found))), fd)
                return found
            finally:
                os.close(fd)

    def write(self, key: str, buffers: Sequence[np.ndarray]) -> None:
        path = self.root / key
        with self._name_failure(key):
            make_folder(path.parent)
            self.refuse_links(path)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
            try:
                _write_all(fd, buffers)
                os.fsync(fd)
            finally:
                os.close(fd)

    def refuse_links(self, path: Path) -> None:
        """Refuse to write through links: in a store from elsewhere any file or folder may be one, and lead anywhere."""
        for part in (path, *path.parents):
            if part == self.root:
                return
            if part.is_symlink():
                raise StoreUnreachable(
                    errno.ELOOP,
                    f"{part} is a symbolic link, and nothing is written through one. Remove it, or replace it by its "
                    "target, then run the same command again",
                )

    def settle(self, folders: Iterable[str]) -> None:
        """Make the names of the files in these folders durable."""
        for folder in folders:
            with self._name_failure(folder):
                sync(self.root / folder)

    def replace(self, key: str, data: bytes) -> None:
        """Write a whole file or none of it; the caller ensures that no one else is replacing this key."""
        path = self.root / key
        temporary = path.with_name(f".{path.name}.tmp")  # one name per key: a killed writer's leftover is reused
        with self._name_failure(key):
            self.write(str(temporary.relative_to(self.root)), [np.frombuffer(data, np.uint8)])
            os.replace(temporary, path)
            sync(path.parent)

    def list(self, folder: str) -> list[str]:
        with name_failure(f"listing {folder} of {self.url}"):
            try:
                return sorted(os.listdir(self.root / folder))
            except FileNotFoundError:
                return []

    def remove(self, key: str) -> None:
        """Remove a file durably: a power cut must not bring back the record of a damaged shard."""
        path = self.root / key
        with self._name_failure(key):
            self.refuse_links(path.parent)
            try:
                path.unlink()
            except FileNotFoundError:
                return
            sync(path.parent)

    def free_bytes(self) -> int | None:
        return free_bytes_at(self.root)

    def _name_failure(self, key: str) -> AbstractContextManager[None]:
        return name_failure(f"writing {key} of {self.url}; committed shards are untouched")


class RemoteFiles:
    """A prefix in an object store, or any other fsspec location. A PUT there is all or nothing."""

    list_beyond = 100_000
    """With more names than this to look for, read the whole listing: hardly any page could be skipped."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, url: str) -> None:
        self.fs = fs
        self.path = path.rstrip("/")
        self.url = url

    def read(self, key: str) -> bytes:
        with self._name_failure("reading", key):
            try:
                return cast(bytes, self.fs.cat_file(f"{self.path}/{key}"))
            except FileNotFoundError:
                raise KeyError(key) from None

    def read_into(self, key: str, body: np.ndarray, tail: np.ndarray) -> tuple[int, int]:
        data = np.frombuffer(self.read(key), np.uint8)
        if len(data) == len(body) + len(tail):
            body[:], tail[:] = data[: len(body)], data[len(body) :]
        return len(data), google_crc32c.value(body)

    def size(self, key: str) -> int:
        with self._name_failure("asking for the size of", key):
            return cast(int, self.fs.size(f"{self.path}/{key}"))

    def exists(self, key: str) -> bool:
        """Bypass fsspec's cached listing, which lacks other writers' newer records, and its `exists`, which in some
        implementations returns False on any error."""
        with self._name_failure("looking for", key):
            self.fs.invalidate_cache(f"{self.path}/{key}")
            try:
                self.fs.info(f"{self.path}/{key}")
            except FileNotFoundError:
                return False
            return True

    def which_exist(self, folder: str, names: Sequence[str]) -> list[str]:
        """Use one listing: a request brings a thousand names."""
        found = set(self.list(folder)) if names else set()
        return [name for name in names if name in found]

    def write(self, key: str, buffers: Sequence[np.ndarray]) -> None:
        self.replace(key, b"".join(buffer.data for buffer in buffers))

    def settle(self, folders: Iterable[str]) -> None:
        """An object is durable when its PUT has returned."""

    def replace(self, key: str, data: bytes) -> None:
        with self._name_failure("writing", key):
            self.fs.pipe_file(f"{self.path}/{key}", data)

    def create(self, key: str, data: bytes) -> bool:
        """Write a whole file unless the key exists; return whether it was written."""
        with self._name_failure("writing", key):
            pauses = iter(CONFLICT_PAUSES)
            while True:
                try:
                    self.fs.pipe_file(f"{self.path}/{key}", data, mode="create")
                    return True
                except FileExistsError:
                    return False
                except OSError as error:
                    if (status := _status_of(error)) == EXISTS:
                        return False
                    if status != CONFLICT or (pause := next(pauses, None)) is None:
                        raise
                    time.sleep(pause)

    def list(self, folder: str) -> list[str]:
        with self._name_failure("listing", folder):
            self.fs.invalidate_cache(f"{self.path}/{folder}")
            try:
                return sorted(name.rsplit("/", 1)[-1] for name in self.fs.ls(f"{self.path}/{folder}", detail=False))
            except FileNotFoundError:
                return []

    def remove(self, key: str) -> None:
        with self._name_failure("removing", key), suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.path}/{key}")

    def free_bytes(self) -> int | None:
        return None

    @contextmanager
    def _name_failure(self, doing: str, key: str) -> Iterator[None]:
        """Turn any error of a network or its library, after its own retries, into one of our errors."""
        try:
            yield
        except (StoreError, KeyError):
            raise
        except Exception as error:
            raise StoreUnreachable(
                getattr(error, "errno", None) or errno.EIO,
                f"{type(error).__name__} while {doing} {key} of {self.url} ({' '.join(str(error).split())}); committed "
                "shards are untouched. Check the network, the address and the credentials, then run the same command "
                "again: it resumes where it stopped",
            ) from error


Files = LocalFiles | RemoteFiles


def _status_of(error: OSError) -> int | None:
    """The HTTP status that botocore received: s3fs recognises refusals only by AWS's own wording."""
    answer: Any = getattr(error.__cause__, "response", None)
    return answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None


class S3Files(RemoteFiles):
    """Files on S3, whose listings are sorted and can start at any name."""

    def which_exist(self, folder: str, names: Sequence[str]) -> list[str]:
        """Fetch only the listing pages that could hold one of the names, skipping long stretches of others."""
        s3: Any = self.fs
        bucket, path, _ = s3.split_path(f"{self.path}/{folder}")
        path += "/"  # s3fs before 2026.2 drops a slash at the end, and would find nothing
        found, left = set(), sorted(names)
        while left:
            with self._name_failure("listing", folder):
                answer = s3.call_s3(
                    "list_objects_v2",
                    Bucket=bucket,
                    Prefix=path,
                    StartAfter=path + left[0][:-1],  # exclusive, and none of our names lies in between
                    MaxKeys=PAGE,
                    **s3.req_kw,
                )
            page = [entry["Key"].removeprefix(path) for entry in answer.get("Contents", ())]
            found.update(page)
            if not answer.get("IsTruncated"):
                break
            if page != sorted(page) or not page or page[-1] < left[0]:  # a server that lists in another order
                return super().which_exist(folder, names)
            left = left[bisect_right(left, page[-1]) :]
        return [name for name in names if name in found]


@contextmanager
def name_full_disk(doing: str) -> Iterator[None]:
    """Turn 'no space left' into an error that names the operation."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK or isinstance(error, StoreFull):
            raise
        raise StoreFull(
            error.errno,
            f"the disk is full while {doing}. "
            "Free some space and run the same command again: it resumes where it stopped",
        ) from None


@contextmanager
def name_failure(doing: str) -> Iterator[None]:
    """Turn a disk's error, a full disk included, into one that names the operation."""
    try:
        with name_full_disk(doing):
            yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreUnreachable(
            error.errno,
            f"{error.strerror or error} while {doing}. "
            "Fix the disk or its permissions, then run the same command again: it resumes where it stopped",
        ) from error


def _is_there(path: Path | str, folder: int | None = None) -> bool:
    """Whether the file exists, relative to an open folder if given. Other errors are raised, unlike by `os.access`, and
    by `Path.exists` from Python 3.14 on."""
    try:
        os.stat(path, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _read_fresh(path: Path) -> bytes:
    """Read a file, even if a network disk has cached it as missing: opening its folder refreshes that."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        with suppress(PermissionError):
            os.close(os.open(path.parent, os.O_RDONLY))
        return path.read_bytes()


def _read_checksummed(fd: int, body: np.ndarray, tail: np.ndarray) -> int:
    """Read the start of a file into `body` and what follows into `tail`; return the crc32c of `body`."""
    crc = 0
    for start in range(0, len(body), _BLOCK):
        block = body[start : start + _BLOCK]
        if not _fill(fd, block, start):
            return crc
        crc = google_crc32c.extend(crc, block)
    _fill(fd, tail, len(body))
    return crc


def _fill(fd: int, block: np.ndarray, offset: int) -> bool:
    """Read until `block` is full; False if the file ends first."""
    filled = 0
    while filled < len(block):
        count = os.preadv(fd, [block.data[filled:]], offset + filled)
        if count == 0:
            return False
        filled += count
    return True


def _write_all(fd: int, buffers: Sequence[np.ndarray]) -> None:
    """Write everything: write(2) may write less than it was given, and always does beyond 2 GiB."""
    for buffer in buffers:
        view = buffer.data
        while len(view):
            view = view[os.write(fd, view) :]


_flushed: set[Path] = set()  # folders whose names are known to be on disk


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and flush their names: a power cut could otherwise lose a folder and its contents.

    The name of an existing folder is flushed too, once: its creator may have died before doing so.
    """
    if path.is_dir():
        if path not in _flushed:
            with suppress(PermissionError):  # unreadable, so we did not make it
                sync(path.parent)
    else:
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)
    _flushed.add(path)


def free_bytes_at(folder: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be on."""
    return shutil.disk_usage(_nearest(folder)).free


def on_one_disk(folder: Path, other: Path) -> bool:
    """Whether both folders are, or will be, on the same disk."""
    return _nearest(folder).stat().st_dev == _nearest(other).stat().st_dev


def _nearest(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
