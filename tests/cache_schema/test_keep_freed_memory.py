"""The allocator's one switch."""

from __future__ import annotations

from saemill.cache_schema.keep_freed_memory import SMALLER_THAN_SHARDS, keep_large_blocks


def test_the_allocator_answers_or_is_not_there(monkeypatch):
    assert keep_large_blocks() in (True, False)
    assert keep_large_blocks(SMALLER_THAN_SHARDS) == keep_large_blocks()  # no system refuses one and not the other
    monkeypatch.setattr("sys.platform", "plan9")
    assert keep_large_blocks() is False
