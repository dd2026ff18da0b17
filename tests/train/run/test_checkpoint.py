"""Checkpoints are whole or not there."""

import json

import pytest
import torch

from saemill.train.disk.checkpoint import Standing, list_checkpoints, load_checkpoint, save_checkpoint
from saemill.train.errors import CheckpointDamaged


def standing(step):
    return Standing(step=step, metrics_bytes=7, seconds=1.5, waited_seconds=0.1, same_pairs=3, pairs=9)


def state(step):
    return {"a": {"w": torch.full((4, 3), float(step)), "n": torch.tensor(step)}, "b": {"w": torch.arange(step)}}


def test_what_is_saved_is_loaded(tmp_path):
    save_checkpoint(tmp_path, standing(5), state(5))
    found = load_checkpoint(tmp_path)
    assert found.standing == standing(5) and found.complaints == ()
    for label, tensors in state(5).items():
        assert all(torch.equal(found.tensors[label][name], tensor) for name, tensor in tensors.items())


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 30, 4000):
        save_checkpoint(tmp_path, standing(step), state(step))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000004000", "step_000000030"]


def test_none_is_not_an_error(tmp_path):
    assert load_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", ["a.safetensors", "b.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_any_damage_falls_back_and_is_told(tmp_path, name, damage):
    for step in (10, 20):
        save_checkpoint(tmp_path, standing(step), state(step))
    path = tmp_path / "step_000000020" / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0x55
        path.write_bytes(bytes(data) if damage == "flip" else bytes(data[:-9]))
    found = load_checkpoint(tmp_path)
    assert found.standing.step == 10
    assert len(found.complaints) == 1 and "step_000000020" in found.complaints[0]


def test_a_flipped_digit_of_where_the_run_stands_is_seen(tmp_path):
    """It parses, and would cut or pad the log of metrics."""
    for step in (10, 20):
        save_checkpoint(tmp_path, standing(step), state(step))
    path = tmp_path / "step_000000020/state.json"
    text = path.read_text()
    for was, now in (('"metrics_bytes": 7', '"metrics_bytes": 3'), ('"format": 2', '"format": 1')):
        assert was in text
        path.write_text(text.replace(was, now))
        found = load_checkpoint(tmp_path)
        assert found.standing.step == 10 and "state.json is not the file" in found.complaints[0]


def test_a_checkpoint_from_before_state_had_a_digest_is_read(tmp_path):
    save_checkpoint(tmp_path, standing(10), state(10))
    path = tmp_path / "step_000000010/state.json"
    old = json.loads(path.read_text()) | {"format": 1}
    del old["digest"]
    path.write_text(json.dumps(old))
    assert load_checkpoint(tmp_path).standing == standing(10)


def test_a_kill_while_saving_leaves_the_one_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, standing(10), state(10))

    def killed(*_):
        raise KeyboardInterrupt

    for step in ("saemill.train.disk.checkpoint.write_json", "saemill.train.disk.checkpoint.os.rename"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(step, killed)
            save_checkpoint(tmp_path, standing(20), state(20))
        assert load_checkpoint(tmp_path).standing.step == 10
    save_checkpoint(tmp_path, standing(20), state(20))
    assert load_checkpoint(tmp_path).standing.step == 20
    assert not list(tmp_path.glob(".*"))


def test_nothing_whole_is_an_error(tmp_path):
    save_checkpoint(tmp_path, standing(10), state(10))
    path = tmp_path / "step_000000010/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointDamaged, match=r"no checkpoint is complete: .*format"):
        load_checkpoint(tmp_path)
