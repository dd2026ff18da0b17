"""The allocator's one switch."""

from __future__ import annotations

import platform

from saemill.cache_schema.keep_freed_memory import SMALLER_THAN_SHARDS, keep_large_blocks


def test_the_allocator_answers_or_is_not_there(monkeypatch):
    has_glibc = platform.libc_ver()[0] == "glibc"
    assert keep_large_blocks(SMALLER_THAN_SHARDS) is keep_large_blocks() is has_glibc
    monkeypatch.setattr("sys.platform", "plan9")
    assert keep_large_blocks() is False
