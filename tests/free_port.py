"""A free port for processes that must find each other."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress


def free_port() -> int:
    """A port below those that the system hands out, from a thousand of its own for each of ten test workers, so that it
    is unlikely to be taken before it is used."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 20_000 + 1_000 * ((worker + os.getppid()) % 10)
    for port in random.sample(range(first, first + 1_000), 100):
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")
