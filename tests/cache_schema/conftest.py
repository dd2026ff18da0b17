"""Fixtures of the store's tests: small stores that any process can make again."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


def _load(name: str) -> ModuleType:
    """A helper module that lies beside the tests: they are no package, so it is loaded by its path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    return _load("synthetic")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows a chunk, so that a shard of four has two chunks of residuals."""
    monkeypatch.setattr("saemill.cache_schema.layout.CHUNK_BYTES", 2 * 8 * 6 * 2)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
