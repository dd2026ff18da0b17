"""What a model was asked is kept between runs where the disk allows it, and never stands in the way."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saemill.evaluate.context import disk_cache
from saemill.evaluate.context.disk_cache import model_print, remembered


def test_what_was_computed_once_is_read(tmp_path: Path) -> None:
    assert remembered(tmp_path / "new", "task", "abc", lambda: [1, 2]) == [1, 2]
    assert remembered(tmp_path / "new", "task", "abc", lambda: [3]) == [1, 2]
    assert remembered(tmp_path / "new", "task", "abd", lambda: [3]) == [3]


@pytest.mark.parametrize("damaged", [b"", b"[1, ", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_computed_again(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "task-abc.json").write_bytes(damaged)
    assert remembered(tmp_path, "task", "abc", lambda: [1, 2]) == [1, 2]
    assert remembered(tmp_path, "task", "abc", lambda: [3]) == [1, 2]


def test_a_place_that_cannot_be_written_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in the way").touch()
    assert remembered(tmp_path / "in the way", "task", "abc", lambda: [1, 2]) == [1, 2]

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache, "replace_file", full)
    assert remembered(tmp_path, "task", "abc", lambda: [1, 2]) == [1, 2]


def test_a_user_without_a_home_is_computed_for_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert remembered("~nobody-here/kept", "task", "abc", lambda: [1, 2]) == [1, 2]
    assert remembered("~nobody-here/kept", "task", "abc", lambda: [3]) == [3]
    assert not list(tmp_path.iterdir())


def test_what_the_computation_itself_raises_is_told(tmp_path: Path) -> None:
    def breaks() -> None:
        raise OSError("planted")

    with pytest.raises(OSError, match="planted"):
        remembered(tmp_path, "task", "abc", breaks)


def test_a_model_is_told_by_its_own_head_too_and_a_tied_one_counts_once() -> None:
    def printed(*parts: torch.nn.Module) -> str:
        whole = SimpleNamespace(model=torch.nn.Sequential(*parts), stack=parts[0], dtype=torch.float32)
        return model_print(SimpleNamespace(tokenizer=SimpleNamespace(digest="d"), **vars(whole)))  # type: ignore[arg-type]

    table, one, other = (torch.nn.Linear(2, 2, bias=False).requires_grad_(False) for _ in range(3))
    assert printed(table, one) != printed(table, other)
    assert printed(table, table) == json.dumps(["d", "torch.float32", [float(table.weight.sum())]])
