"""Shared by downloads: the errors of a lost network, quiet progress bars, and a check for disk space."""

import sys
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] (from whichever HTTP library the hub's client uses)
)

from ..cache_schema.disk_and_cloud_files import free_bytes_at
from ..cache_schema.numbers_in_words import say_size
from .errors import ModelUnavailable

# ImportError is raised if a proxy needs a package that is not installed.
NETWORK_ERRORS = (OSError, HTTPError, ImportError)
TRIES = 2  # of a failed read inside `datasets`, 5 to 60 seconds apart: streams are retried here anyway
INSTALL = "install the missing package, `pip install socksio` for a SOCKS proxy, or unset the proxy"


def load_dataset(*args: Any, **kwargs: Any) -> Any:
    """`datasets.load_dataset`, imported late because it takes seconds, without progress bars off a terminal."""
    import datasets
    from datasets import config

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = TRIES
    return datasets.load_dataset(*args, **kwargs)


def require_room(name: str, needed: int, folder: Path) -> None:
    """Refuse model files that do not fit the disk, before they are written or downloaded."""
    free = free_bytes_at(folder)
    if needed > free:
        raise ModelUnavailable(
            f"{name}: its files take {say_size(needed)}, but {folder} has {say_size(free)} free. "
            "Free some space, or set HF_HOME to a folder on another disk"
        )
