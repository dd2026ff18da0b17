"""Fixtures for the store's tests: small stores that any process can reproduce, and an S3 server."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import fsspec
import numpy as np
import pytest

from . import synthetic as synthetic_stores


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    return synthetic_stores


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows per chunk, so that a shard of four has two chunks of residuals."""
    monkeypatch.setattr("saemill.cache_schema.layout.CHUNK_BYTES", 2 * 8 * 6 * 2)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server of the real protocol."""
    command = [sys.executable, Path(__file__).with_name("s3_server.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout.readline().decode().strip()


class Nursery:
    """The other end of `crash_nursery.py`."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("crash_nursery.py")
        self.process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, **request) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def run(self, folder: Path, shards: int, die_at: int | None = None) -> int:
        """Write until done or dead; return the exit status."""
        return self.ask(wait=self.ask(start=str(folder), shards=shards, die_at=die_at))

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@contextmanager
def s3_at(address: str, **settings: str) -> Iterator[None]:
    """A server with a bucket called mill, found through the environment, in which no settings of the user remain."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("AWS_ACCESS_KEY_ID", "anybody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        for name, value in settings.items():
            patch.setenv(name, value)
        forget_instances()
        fsspec.filesystem("s3").makedirs("mill", exist_ok=True)
        yield
        forget_instances()


def forget_instances() -> None:
    """Collect the instances here: the `__del__` of their open sessions would warn in whichever test collected them."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
