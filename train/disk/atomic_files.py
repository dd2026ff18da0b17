"""Files that are written completely or not at all, as JSON or bytes, and locks on files."""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from ...cache_schema.disk_and_cloud_files import sync
from ..errors import ConfigInvalid


def replace_file(path: Path, data: bytes) -> None:
    replace_written(path, lambda beside: beside.write_bytes(data))


def replace_written(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a path next to the destination, flush that file, and move it into place."""
    temporary = hidden_name_beside(path)
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:  # if the disk is full, the space is needed
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def hidden_name_beside(path: Path) -> Path:
    """A random hidden name in the same folder: processes on a shared disk can have the same number."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def take_lock(file: IO[bytes]) -> bool | None:
    """Lock a file until it is closed or the process exits. True: locked; False: the disk has no locks; None: another
    process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if isinstance(error, BlockingIOError) else False
    return True


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file completely or not at all."""
    replace_file(path, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigInvalid(f"expected {path.name} in {path.parent}, found none: copy the folder again") from None
    except (ValueError, RecursionError) as error:
        raise ConfigInvalid(f"{path} is not JSON ({error}): copy it again") from None
    if not isinstance(value, dict):
        raise ConfigInvalid(f"{path}: expected an object, found {type(value).__name__}")
    return value


def encode_line(values: Mapping[str, Any]) -> bytes:
    """One line of JSON; NaN and infinities, which JSON does not have, become null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(plain, allow_nan=False).encode() + b"\n"
