"""What a lost network raises, whichever library asks; and the one library that must be told to be quiet."""

import sys
from typing import Any

from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] (of whichever HTTP library the hub's client uses)
)

NETWORK_ERRORS = (OSError, HTTPError)


def load_dataset(*args: Any, **kwargs: Any) -> Any:
    """The function of `datasets`, whose import takes seconds. Off a terminal its bars would be control characters."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets.load_dataset(*args, **kwargs)
