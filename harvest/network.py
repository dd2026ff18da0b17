"""What a lost network raises, whichever library asks."""

from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] (of whichever HTTP library the hub's client uses)
)

NETWORK_ERRORS = (OSError, HTTPError)
