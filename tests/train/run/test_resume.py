"""Killed and resumed runs end with the bits of those that were left alone."""

import errno
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
import torch

from saemill.train.disk.write_and_load_checkpoints import list_checkpoints
from saemill.train.engine.fleet_of_saes import Fleet
from saemill.train.run import validate_and_save_results as ending
from saemill.train.run.after_run import Onlookers
from saemill.train.run.run_folder import MetricsLog

COURSE = ["--variant", "topk", "--epochs", "2", "--set", "course.metrics_every_steps=1"]
COURSE += ["--set", "course.checkpoint_every_steps=7"]


def wait_for_step(run, step, process, seconds=120):
    """Until the run's log has reached a step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        path = run / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        if len(lines) > 1 and json.loads(lines[-2])["step"] >= step:
            return
        time.sleep(0.005)
    raise TimeoutError(f"the run did not reach step {step}")


@pytest.fixture(scope="module")
def straight(big, quick, tmp_path_factory):
    """A run that nobody disturbed."""
    from click.testing import CliRunner

    from saemill.train.cli import main

    out = tmp_path_factory.mktemp("straight")
    words = [*COURSE, *quick, "--cache", big["path"], "--out", str(out), "--name", "run"]
    assert CliRunner().invoke(main, words, catch_exceptions=False).exit_code == 0
    return out / "run"


WAITING = """
import time
from saemill.train.cli import main
from saemill.train.engine.fleet_of_saes import Fleet
step = Fleet.step
Fleet.step = lambda fleet, draw: step(fleet, draw) if fleet.steps_taken < 80 else time.sleep(600)
main()
"""


@pytest.fixture(scope="module")
def killed(big, spawn_in, quick, tmp_path_factory):
    """A run with two checkpoints that was killed without warning, at a random step."""
    out = tmp_path_factory.mktemp("killed")
    process = spawn_in(out, *COURSE, *quick, "--cache", big["path"], "--name", "run", code=WAITING)
    wait_for_step(out / "run", random.randrange(30, 70), process)
    process.kill()
    process.wait()
    return out / "run"


@pytest.fixture
def stopped(killed, tmp_path):
    """A copy of it, to go on from or to damage."""
    return shutil.copytree(killed, tmp_path / "runs/run")


def test_killed_without_warning(stopped, sae_train, straight, same_bits):
    assert not (stopped / "result.json").exists()
    assert "continuing after step" in sae_train("--resume", "run", "--device", "cpu").output
    same_bits(stopped, straight)


def test_a_run_says_where_it_was_gone_on_with(stopped, sae_train):
    """Another version, commit or device computes other digits."""
    config = json.loads((stopped / "config.json").read_text())
    config["provenance"]["packages"]["torch"] = "1.0"
    config["provenance"]["hardware"]["device"] = "a card of before"
    (stopped / "config.json").write_text(json.dumps(config))
    said = " ".join(sae_train("--resume", "run", "--device", "cpu").output.split())
    assert f"torch {version('torch')} (before: 1.0)" in said and "(before: a card of before)" in said
    found = json.loads((stopped / "config.json").read_text())
    (resumed,) = found.pop("resumed")
    assert found == config and resumed["hardware"]["device"].startswith("cpu, ")
    (stopped / "result.json").unlink()
    assert "changed since before" not in sae_train("--resume", "run", "--device", "cpu").output
    assert len(json.loads((stopped / "config.json").read_text())["resumed"]) == 2


@pytest.mark.parametrize("is_there", [True, False])
def test_a_log_that_lost_lines_is_told_and_recorded(stopped, sae_train, is_there):
    """The curves of such a run have a gap, which no one could tell from the numbers."""
    log = stopped / "metrics.jsonl"
    state = json.loads((list_checkpoints(stopped / "checkpoints")[0] / "state.json").read_text())
    size = state["standing"]["metrics_bytes"]
    whole = log.read_bytes().index(b"\n") + 1
    if is_there:
        os.truncate(log, whole + 3)
    else:
        log.unlink()
    lost = size - (whole if is_there else 0)
    said = " ".join(sae_train("--resume", "run", "--device", "cpu").output.split())
    assert f"metrics.jsonl lacks its last {lost:,} bytes before the checkpoint: curves have a gap there" in said
    (resumed,) = json.loads((stopped / "config.json").read_text())["resumed"]
    assert resumed["lost_bytes_of_metrics"] == lost and "lost_bytes" not in said
    (stopped / "result.json").unlink()
    assert "lost_bytes" not in sae_train("--resume", "run", "--device", "cpu").output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop(big, sae_train, quick, tmp_path, straight, same_bits, number, monkeypatch):
    """Ctrl-C, kill -TERM and a closed terminal save at the step they came in."""
    words = [*COURSE, *quick, "--cache", big["path"], "--name", "run", "--set", "course.checkpoint_every_steps=9999"]
    step = Fleet.step

    def press_at_40(fleet, draw):
        if fleet.steps_taken == 40:
            signal.raise_signal(number)
        return step(fleet, draw)

    monkeypatch.setattr(Fleet, "step", press_at_40)
    before = signal.signal(number, signal.default_int_handler)  # these tests may run in the background of a shell
    try:
        said = sae_train(*words, code=128 + number).output
    finally:
        signal.signal(number, before)
    monkeypatch.undo()
    assert "resume with: sae-train --resume" in said
    assert len(list((tmp_path / "runs/run/checkpoints").iterdir())) == 1
    sae_train("--resume", "run", "--device", "cpu")
    same_bits(tmp_path / "runs/run", straight)


TALKING = """
import os, signal, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
os.open(os.ttyname(1), os.O_RDWR) if os.isatty(1) else None  # the terminal of this session
from saemill.train.cli import main
from saemill.train.engine.fleet_of_saes import Fleet
Fleet.take_news = lambda self: time.sleep(0.02) or ["news"]  # a line in every step, of which there are 200
main()
"""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_closed_terminal_or_pipe_costs_no_save(big, quick, tmp_path, straight, sae_train, same_bits, is_terminal):
    """Of a closed terminal SIGHUP tells; a pipe of which nobody reads any more only breaks, as when Ctrl-C ends `tee`
    too."""
    out, write = pty.openpty() if is_terminal else os.pipe()
    words = [*COURSE, *quick, "--cache", big["path"], "--name", "run", "--out", tmp_path / "runs"]
    words += ["--set", "course.checkpoint_every_steps=9999"]
    command = [sys.executable, "-c", TALKING, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, stdout=write, stderr=write, env=environment, start_new_session=True) as process:
        os.close(write)
        said = b""
        while b"news" not in said:
            said += os.read(out, 1000)
        os.close(out)
        if not is_terminal:
            wait_for_step(tmp_path / "runs/run", 5, process)
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + (signal.SIGHUP if is_terminal else signal.SIGTERM)
    assert len(list_checkpoints(tmp_path / "runs/run/checkpoints")) == 1
    sae_train("--resume", "run", "--device", "cpu")
    same_bits(tmp_path / "runs/run", straight)


@pytest.mark.slow
def test_killed_again_and_again(big, spawn, quick, tmp_path, straight, same_bits):
    """Five times kill -9, whatever the run is doing."""
    words = [*COURSE, *quick, "--cache", big["path"], "--name", "run"]
    for _ in range(5):
        process = spawn(*words)
        if words[0] != "--resume":
            wait_for_step(tmp_path / "runs/run", 1, process)
        time.sleep(random.uniform(0, 4))
        process.kill()
        process.wait()
        words = ["--resume", "run", "--device", "cpu"]
        if (tmp_path / "runs/run/result.json").exists():
            break
    else:
        assert spawn(*words).wait() == 0
    same_bits(tmp_path / "runs/run", straight)


def test_a_damaged_checkpoint_falls_back(stopped, sae_train, straight, same_bits, tmp_path):
    """A flipped byte in the newest: reported, skipped, and the end is the same. Then in both, and in state.json."""
    newest, older, *others = list_checkpoints(stopped / "checkpoints")
    for one in others:  # the kill may have come before it was dropped
        shutil.rmtree(one)
    for path in (newest / "topk.safetensors", older / "topk.safetensors"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        copy = tmp_path / "copies" / path.parent.name
        shutil.copytree(stopped, copy)
        result = sae_train("--resume", copy, "--device", "cpu", code=0 if path.parent == newest else 1)
        if path.parent == newest:
            assert f"{newest.name}/topk.safetensors differs from the file that was written" in result.output
            assert f"continuing after step {int(older.name[5:])}" in result.output
            same_bits(copy, straight)
        else:
            assert "no checkpoint can be read" in result.output
            assert not (copy / "result.json").exists()


def test_another_store_is_refused_on_resume(stopped, write_store, sae_train, tmp_path):
    write_store(tmp_path / "other", windows=300, seed=9)
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    result = sae_train("--resume", "run", "--cache", tmp_path / "other", code=1)
    assert "expected the store with cache id" in result.output
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*")} == before


def test_a_store_that_is_read_in_another_order_is_refused_on_resume(stopped, sae_train):
    """The id is of what is in the store; how many windows a shard has decides the order in which they are read."""
    config = json.loads((stopped / "config.json").read_text())
    for broken, said in (
        ({"init": {"folder": "x"}}, "init.sha256: missing; copy the folder again"),
        (
            {"data": config["data"] | {"pool_tokens": None}},
            "data.pool_tokens: expected a whole number, found None; copy",
        ),
        ({"total_steps": 0}, "total_steps: expected 1 or more, found 0; copy"),
        ({"cache": config["cache"] | {"url": 5}}, "to name the run's store, found no url and cache_id: copy"),
    ):
        (stopped / "config.json").write_text(json.dumps(config | broken))
        assert said in sae_train("--resume", "run", code=1).output
    found = config["cache"]["shard_windows"]
    (stopped / "config.json").write_text(json.dumps(config | {"cache": config["cache"] | {"shard_windows": 7}}))
    result = sae_train("--resume", "run", code=1)
    assert f"expected a store with 7 windows per shard, found {found}" in result.output


def test_one_process_trains_a_run(stopped, sae_train, monkeypatch):
    """The other's log would be cut, and its checkpoints removed."""
    log = MetricsLog(stopped / "metrics.jsonl")
    before = (stopped / "metrics.jsonl").read_bytes()
    assert "another process is training" in sae_train("--resume", "run", "--device", "cpu", code=1).output
    assert (stopped / "metrics.jsonl").read_bytes() == before
    for name in ("Trackers", "Progress"):  # which nobody would close
        monkeypatch.setattr(f"saemill.train.run.start_or_resume.{name}", pytest.fail)
    assert "another process is training" in sae_train("--resume", "run", "--device", "cpu", code=1).output
    monkeypatch.undo()
    log.close()
    sae_train("--resume", "run", "--device", "cpu")


def test_how_far_a_run_is_is_read_when_no_other_process_trains_it(stopped, sae_train, straight, same_bits, monkeypatch):
    """The other saves a newer checkpoint, drops an older one and leaves; or it ends the run."""
    newest, older, *_ = list_checkpoints(stopped / "checkpoints")
    away = shutil.move(newest, stopped.parent / newest.name)
    take = MetricsLog.__init__

    def meanwhile(log, path):
        if away.exists():
            shutil.move(away, newest)
            shutil.rmtree(older)
        else:
            shutil.copytree(straight, stopped, dirs_exist_ok=True)
        take(log, path)

    monkeypatch.setattr(MetricsLog, "__init__", meanwhile)
    assert f"continuing after step {int(newest.name[5:])}" in sae_train("--resume", "run", "--device", "cpu").output
    same_bits(stopped, straight)
    for file in ("result.json", "metrics.jsonl"):
        (stopped / file).unlink()
    assert "is finished" in sae_train("--resume", "run", "--device", "cpu", code=1).output
    same_bits(stopped, straight)


def test_a_disk_without_locks_is_told_of(big, sae_train, quick, tmp_path, rewind, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    words = ["--variant", "topk", *quick, "--cache", big["path"], "--name", "run", "--tokens", "640"]
    begun = sae_train(*words, "--set", "course.checkpoint_every_steps=5").output
    rewind(tmp_path / "runs/run")
    for said in (begun, sae_train("--resume", "run", "--device", "cpu").output):
        assert said.count("runs/run: no locks on this disk, so nothing keeps a second process from training") == 1


@pytest.mark.parametrize("is_removed", [True, False])
@pytest.mark.parametrize("place, name", [(Fleet, "step"), (ending, "validate"), (ending, "_outcome")])
def test_a_run_whose_folder_is_removed_or_replaced_writes_nothing_there(
    big, sae_train, quick, tmp_path, monkeypatch, place, name, is_removed
):
    """Before a checkpoint, the SAEs or the result are written."""
    run, away, files = tmp_path / "runs/run", tmp_path / "away", []
    do = getattr(place, name)

    def replaced(*given):
        if not away.exists():
            run.rename(away)
            if not is_removed:
                shutil.copytree(away, run)
                files.extend(sorted(run.rglob("*")))
        return do(*given)

    monkeypatch.setattr(place, name, replaced)
    words = ["--variant", "topk", *quick, "--cache", big["path"], "--name", "run", "--tokens", "640"]
    said = sae_train(*words, "--set", "course.checkpoint_every_steps=5", code=1).output
    assert f"error: expected {run}/metrics.jsonl to be the log that this process writes, found " in said
    assert "--name" in said and sorted(run.rglob("*")) == files and not (run / "result.json").exists()


def test_no_page_of_a_run_is_written_into_the_folder_of_another(big, sae_train, quick, tmp_path, monkeypatch):
    run, look, seen = tmp_path / "runs/run", Onlookers.look, []

    def looked(onlookers):
        seen.append(look(onlookers))
        if len(seen) == 2:
            shutil.copytree(run.rename(tmp_path / "away"), run)

    monkeypatch.setattr(Onlookers, "look", looked)
    words = ["--variant", "topk", *quick, "--cache", big["path"], "--name", "run", "--tokens", "640", "--plots"]
    said = sae_train(*words, "--set", "course.metrics_every_steps=1", code=1).output
    assert "to be the log that this process writes" in said and len(seen) == 2


def test_a_checkpoint_of_another_run_is_not_gone_on_from(stopped, sae_train):
    """It went on after its folder was removed, and the run of now has its name; runs of before have no id."""
    config = json.loads((stopped / "config.json").read_text())
    own, made = config["provenance"].pop("run_id"), config["provenance"]
    assert len(own) == 32
    for broken, said in (
        ({"provenance": {**made, "run_id": "another"}}, "belongs to another run, perhaps one that kept training"),
        ({"total_steps": 3}, "does not belong to this run: expected at most its 3 steps"),
    ):
        (stopped / "config.json").write_text(json.dumps(config | broken))
        assert said in sae_train("--resume", "run", "--device", "cpu", code=1).output
    (stopped / "config.json").write_text(json.dumps(config))
    assert "continuing after step" in sae_train("--resume", "run", "--device", "cpu").output


def test_an_sae_under_another_label_than_its_checkpoint_s_is_named(stopped, sae_train):
    config = json.loads((stopped / "config.json").read_text())
    config["saes"] = {"mine": config["saes"].pop("topk")}
    (stopped / "config.json").write_text(json.dumps(config))
    said = sae_train("--resume", "run", "--device", "cpu", code=1).output
    assert "error: expected a checkpoint with mine, found none of that name" in said


def test_a_finished_run_is_not_resumed(straight, sae_train):
    assert "is finished" in sae_train("--resume", straight, code=1).output


def test_a_run_that_stopped_between_its_last_step_and_its_result_ends_well(big, sae_train, quick, tmp_path):
    words = ["--variant", "topk", *quick, "--cache", big["path"], "--name", "short", "--tokens", "640"]
    sae_train(*words, "--set", "course.checkpoint_every_steps=1")
    (tmp_path / "runs/short/result.json").unlink()
    sae_train("--resume", "short", "--device", "cpu")
    assert [path.name for path in list_checkpoints(tmp_path / "runs/short/checkpoints")] == ["step_000000010"]
    result = json.loads((tmp_path / "runs/short/result.json").read_text())
    assert result["steps"] == 10 and result["saes"]["topk"]["loss"] is None


def test_settings_cannot_change_on_resume(straight, sae_train):
    assert "leave out --set" in sae_train("--resume", straight, "--set", "k=3", code=1).output
    for option in ("tokens", "epochs", "layer", "width", "k", "lr", "seed"):
        value = 0 if option in ("seed", "layer") else 3
        assert f"leave out --{option}\n" in sae_train("--resume", straight, f"--{option}", value, code=1).output
