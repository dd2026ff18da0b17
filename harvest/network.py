"""What downloads share: what a lost network raises, a library that must be told to be quiet, and room on the disk."""

import sys
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] (of whichever HTTP library the hub's client uses)
)

from ..cache_schema.disk_and_cloud_files import free_bytes_at
from ..cache_schema.numbers_in_words import say_size
from .errors import ModelUnavailable

# The last is raised where a proxy is set that takes a package which is not installed.
NETWORK_ERRORS = (OSError, HTTPError, ImportError)
TRIES = 2  # inside `datasets`, of a read that fails, 5 to 60 seconds apart: who streams tries again anyway
INSTALL = "install the package that is missing, `pip install socksio` for a SOCKS proxy, or unset the proxy"


def load_dataset(*args: Any, **kwargs: Any) -> Any:
    """The function of `datasets`, whose import takes seconds. Off a terminal its bars would be control characters."""
    import datasets
    from datasets import config

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = TRIES
    return datasets.load_dataset(*args, **kwargs)


def require_room(name: str, needed: int, folder: Path) -> None:
    """Refuse a model's files that the disk cannot hold, before they are made or downloaded."""
    free = free_bytes_at(folder)
    if needed > free:
        raise ModelUnavailable(
            f"{name}: its files take {say_size(needed)}, but {folder} has {say_size(free)} free. "
            "Free some space, or set HF_HOME to a folder on another disk"
        )
