"""Checkpoints are whole or not there."""

import errno
import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from saemill.train.config.run_config import CourseConfig
from saemill.train.disk import write_and_load_checkpoints
from saemill.train.disk.write_and_load_checkpoints import (
    Standing,
    Writer,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from saemill.train.engine.fleet_of_saes import Fleet
from saemill.train.errors import CheckpointDamaged, RunNotWritten
from saemill.train.parallel.processes import SOLO, Group
from saemill.train.run import checkpoints_and_signals
from saemill.train.run.checkpoints_and_signals import Caught, Saver
from saemill.train.run.run_folder import MetricsLog


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


def test_what_a_full_disk_left_of_another_step_is_gone(tmp_path):
    (tmp_path / ".step_000000003.tmp").mkdir()
    (tmp_path / ".step_000000003.tmp/a.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, standing(7), state(7))
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000007"]


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


def test_processes_verify_their_own_saes_and_take_one_checkpoint(tmp_path, threads, monkeypatch):
    """What one of them finds damaged is skipped, and told, in all. Each read the files of the whole fleet."""
    for step in (10, 20):
        save_checkpoint(tmp_path, standing(step), state(step))
    digested, digest = [], write_and_load_checkpoints._digest
    monkeypatch.setattr(
        write_and_load_checkpoints,
        "_digest",
        lambda path: digested.append((path.parent.name, path.name)) or digest(path),
    )
    ranks, run = threads(2)

    def load(rank):
        return load_checkpoint(tmp_path, {"ab"[rank]}, ranks[rank])

    assert [(found.standing.step, *found.tensors) for found in run(load)] == [(20, "a"), (20, "b")]
    assert sorted(digested) == [("step_000000020", f"{label}.safetensors") for label in "ab"]
    (tmp_path / "step_000000020/b.safetensors").write_bytes(b"")
    first, second = run(load)
    assert [(found.standing.step, *found.tensors) for found in (first, second)] == [(10, "a"), (10, "b")]
    assert first.complaints == second.complaints and "step_000000020/b.safetensors differs" in first.complaints[0]
    (tmp_path / "step_000000010/a.safetensors").unlink()
    with pytest.raises(
        CheckpointDamaged, match=r"no checkpoint .*20/b\.safetensors differs.*10/a\.safetensors differs"
    ):
        run(load)
    for found in list_checkpoints(tmp_path):
        (found / "state.json").unlink()
    with pytest.raises(CheckpointDamaged) as told:
        run(load)
    assert str(told.value).count("found none") == 2  # both find each, and it is told once


def test_behind_a_damaged_one_two_are_kept_again(tmp_path):
    for step in (10, 20):
        save_checkpoint(tmp_path, standing(step), state(step))
    (tmp_path / "step_000000020/state.json").unlink()
    for step in (12, 14):
        save_checkpoint(tmp_path, standing(step), state(step))
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step_0000000{step}" for step in (20, 14, 12)]


def test_the_checkpoint_of_another_run_is_refused_and_one_without_an_id_is_not(tmp_path):
    """Another run, whose folder was removed, may have written it here."""
    save_checkpoint(tmp_path, standing(10), state(10))
    save_checkpoint(tmp_path, replace(standing(20), run_id="theirs"), state(20))
    assert load_checkpoint(tmp_path).standing.step == load_checkpoint(tmp_path, run_id="theirs").standing.step == 20
    found = load_checkpoint(tmp_path, run_id="ours")
    assert found.standing == standing(10) and "step_000000020 belongs to another run" in found.complaints[0]
    found = load_checkpoint(tmp_path, most_steps=19)
    assert found.standing == standing(10) and "at most its 19 steps, found 20" in found.complaints[0]
    assert load_checkpoint(tmp_path, most_steps=20).complaints == ()
    save_checkpoint(tmp_path, replace(standing(10), run_id="theirs"), state(10))
    with pytest.raises(CheckpointDamaged, match="no checkpoint can be read: .*step_000000020 belongs to another run"):
        load_checkpoint(tmp_path, run_id="ours")


def test_a_flipped_digit_of_where_the_run_stands_is_seen(tmp_path):
    """It parses, and would cut or pad the log of metrics."""
    for step in (10, 20):
        save_checkpoint(tmp_path, standing(step), state(step))
    path = tmp_path / "step_000000020/state.json"
    text = path.read_text()
    assert '"metrics_bytes": 7' in text
    path.write_text(text.replace('"metrics_bytes": 7', '"metrics_bytes": 3'))
    found = load_checkpoint(tmp_path)
    assert found.standing.step == 10 and "state.json differs from the file" in found.complaints[0]


def test_a_kill_while_saving_leaves_the_one_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, standing(10), state(10))

    def killed(*_):
        raise KeyboardInterrupt

    for step in (
        "saemill.train.disk.write_and_load_checkpoints.write_json",
        "saemill.train.disk.write_and_load_checkpoints.os.rename",
    ):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(step, killed)
            save_checkpoint(tmp_path, standing(20), state(20))
        assert load_checkpoint(tmp_path).standing.step == 10
    save_checkpoint(tmp_path, standing(20), state(20))
    assert load_checkpoint(tmp_path).standing.step == 20
    assert not list(tmp_path.glob(".*"))


def test_a_log_that_lost_its_end_keeps_whole_lines(tmp_path):
    """It is not filled up with zeros, which no reader of JSON takes."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n{"st')
    log = MetricsLog(path)
    log.cut(1000)
    assert log.lost_bytes == 1000 - 24
    log.write({"step": 2})
    assert (log.size, path.read_bytes()) == (36, b'{"step": 0}\n{"step": 1}\n{"step": 2}\n')
    log.cut(12)
    log.close()
    assert path.read_bytes() == b'{"step": 0}\n'


@pytest.mark.parametrize(
    ("format_", "advice"), [(99, "update saemill"), (1, r"earlier version.* no longer read\. Start the run again")]
)
def test_nothing_that_can_be_read_is_an_error(tmp_path, format_, advice):
    save_checkpoint(tmp_path, standing(10), state(10))
    path = tmp_path / "step_000000010/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": format_}))
    with pytest.raises(CheckpointDamaged, match=rf"no checkpoint can be read: .*found {format_}: .*{advice}"):
        load_checkpoint(tmp_path)


@pytest.fixture
def writer(tmp_path):
    writer = Writer(tmp_path / "run/checkpoints")
    yield writer
    writer.close()


@pytest.fixture
def gate(monkeypatch):
    """A disk that writes no file until it is told to."""
    opened, sync = threading.Event(), write_and_load_checkpoints.sync

    def slow(path):
        assert opened.wait(60)
        sync(path)

    monkeypatch.setattr(write_and_load_checkpoints, "sync", slow)
    yield opened
    opened.set()


def test_a_slow_disk_holds_up_no_step_and_one_is_in_flight(writer, gate, tmp_path):
    folder = tmp_path / "run/checkpoints"
    writer.begin(standing(10), state(10))
    writer.check()
    assert load_checkpoint(folder) is None
    second = threading.Thread(target=writer.begin, args=(standing(20), state(20)))
    second.start()
    second.join(0.2)
    assert second.is_alive() and not list(folder.glob(".step_000000020*"))  # waits for the first
    gate.set()
    second.join(60)
    writer.finish()
    assert [path.name for path in list_checkpoints(folder)] == ["step_000000020", "step_000000010"]


def test_what_is_in_flight_at_the_end_is_whole(writer, gate, tmp_path):
    writer.begin(standing(10), state(10))
    threading.Timer(0.1, gate.set).start()
    writer.close()
    assert load_checkpoint(tmp_path / "run/checkpoints").standing.step == 10


@pytest.mark.parametrize("call", ["check", "finish", "begin"])
def test_a_full_disk_is_told_by_the_next_call(writer, tmp_path, monkeypatch, call):
    writer.begin(standing(10), state(10))
    writer.finish()

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(write_and_load_checkpoints, "sync", full)
        writer.begin(standing(20), state(20))
        writer._writing[1].exception(60)
    words = (standing(30), state(30)) if call == "begin" else ()
    with pytest.raises(RunNotWritten, match="step 20 .*No space left.*--resume"):
        getattr(writer, call)(*words)
    writer.check()  # told once
    assert load_checkpoint(tmp_path / "run/checkpoints").standing.step == 10


def test_an_error_of_a_run_does_not_hide_behind_its_checkpoint(writer, monkeypatch):
    monkeypatch.setattr(write_and_load_checkpoints, "sync", lambda path: 1 / 0)
    writer.begin(standing(10), state(10))
    writer.close()


def test_a_run_with_default_settings_is_saved_by_the_clock(big, sae_train, quick, monkeypatch):
    """Every five minutes, here of steps that take two."""
    now, saved, step, begin = [0.0], [], Fleet.step, Writer.begin

    def slow(fleet, draw):
        now[0] += 120
        return step(fleet, draw)

    monkeypatch.setattr(checkpoints_and_signals, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Fleet, "step", slow)
    monkeypatch.setattr(Writer, "begin", lambda writer, at, state: saved.append(at.step) or begin(writer, at, state))
    sae_train("--variant", "topk", *quick, "--cache", big["path"], "--tokens", 640)
    assert saved == [3, 6, 9, 10]


def test_a_run_whose_disk_is_full_ends_in_one_line(big, sae_train, quick, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write_and_load_checkpoints, "sync", full)
    words = ["--variant", "topk", *quick, "--cache", big["path"], "--name", "run"]
    result = sae_train(*words, "--set", "course.checkpoint_every_steps=3", code=1)
    assert "error: the checkpoint of step 3 could not be written" in result.output


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoints_and_signals, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def saver_of(monkeypatch, writer, group, lends_state=True) -> Saver:
    monkeypatch.setattr(checkpoints_and_signals, "Writer", lambda *_: writer)
    process = SimpleNamespace(group=group, team=group, is_spread=False)
    fleet = SimpleNamespace(state=dict, lends_state=lends_state)
    watch = SimpleNamespace(standing=lambda steps, run_id: standing(steps))
    return Saver(None, CourseConfig(), fleet, watch, process, "run")


@pytest.mark.parametrize(
    ("stands_still", "in_background", "saved"),
    [
        (1, 0, [310, 621, 932]),  # every 300 seconds, as asked
        (60, 0, [310, 1580, 2850]),  # on a CPU, with much to write: a twentieth of the time
        (1, 900, [310, 1511, 2712]),  # on a GPU: none is begun that would wait for the one before
    ],
)
def test_saves_by_the_clock_take_a_twentieth_of_the_time(monkeypatch, clock, stands_still, in_background, saved):
    """A step takes ten seconds. A dictionary of 262,144 latents has 14 GB to save."""
    begun, written = [], [0.0]

    class Writing(SimpleNamespace):
        is_writing = property(lambda _: clock[0] < written[0])

        def begin(self, standing, state):
            assert not self.is_writing
            begun.append(clock[0])
            clock[0] += stands_still
            written[0] = clock[0] + in_background

    writer = Writing(finish=lambda: None, check=lambda: None)
    saver = saver_of(monkeypatch, writer, SOLO, lends_state=not in_background)
    for step in range(1, 300):
        clock[0] += 10
        saver.save_if_due(step, 1000, Caught())
    assert begun[: len(saved)] == saved


def test_several_processes_save_when_all_are_ready(monkeypatch, clock):
    """Only those that write know what that takes."""

    class Two(Group):
        size, others_wait = 2, True

        def any(self, flag: bool) -> bool:
            return flag or self.others_wait

    group = Two()
    saver = saver_of(monkeypatch, SimpleNamespace(is_writing=False), group)
    clock[0] = 301.0
    assert not saver._is_due(16)
    group.others_wait = False
    assert not saver._is_due(17) and saver._is_due(32)
