"""A run that does not fit is refused with what it needs."""

import pytest
import torch

from saemill.train import memory
from saemill.train.config import Ask
from saemill.train.errors import MemoryTooSmall
from saemill.train.settings import parse_settings

CPU = torch.device("cpu")


def member(*words):
    return Ask.of_variants(("topk",), parse_settings(words)).members(lambda _: {})[0]


def test_what_a_width_needs():
    """F = 1000, D = 64: two tables, four copies, four bytes."""
    assert memory.weight_bytes(member("width=1000"), 64) == 1000 * 64 * 2 * 4 * 4
    assert memory.weight_bytes(member("width=1000"), 64, shards=8) == 1000 * 64 * 2 * 4 * 2.5


def test_refused_with_numbers(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    memory.require_room([member("width=1000")], 64, 512, 10**6, 1, CPU)
    with pytest.raises(MemoryTooSmall, match=r"expected 3\.\d GiB of memory on cpu .* found 1\.0 GiB free"):
        memory.require_room([member("width=200000")], 512, 512, 10**6, 1, CPU)


def test_free_memory_is_a_sane_number():
    assert 2**20 < memory.free_bytes(CPU) < 2**50
