"""Two processes on a share of a batch each, against one process on all of it."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from saemill.cache_schema import Store
from saemill.train.config.run_config import CourseConfig
from saemill.train.errors import CheckpointDamaged
from saemill.train.parallel.processes import SOLO, Group
from saemill.train.run.checkpoints_and_signals import Saver
from saemill.train.run.process import Process
from saemill.train.run.run_folder import MetricsLog, RunFolder
from saemill.train.run.start_or_resume import resume_run

from ...free_port import free_port


def launch(spawn, words, codes=(0, 0), **options):
    """The command as `torchrun` would start it, once for each code; what each said, which ended with its exit code."""
    where = {"WORLD_SIZE": str(len(codes)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [spawn(*words, **where, RANK=str(r), LOCAL_RANK=str(r), **options) for r in range(len(codes))]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == list(codes), said
    return said


TWICE = """
import torch
from saemill.train import train_runs
from saemill.train.cli import main

train_all = train_runs.train_all

def twice(words, process):
    counts = torch.arange(3)
    assert process.team.sum(counts).tolist() == [0, 2, 4] and counts.tolist() == [0, 1, 2]
    yield from train_all({**words, "name": "two"}, process)
    yield from train_all({**words, "name": "split", "set": (*words["set"], "course.shard_width=true")}, process)

train_runs.train_all = twice
main()
"""


@pytest.mark.parametrize(
    "variant", ["topk", *(pytest.param(n, marks=pytest.mark.slow) for n in ("batchtopk", "jumprelu"))]
)
def test_two_processes_train_as_one_on_shares_of_rows_and_of_latents(big, spawn, sae_train, quick, tmp_path, variant):
    """Weights and checkpoints agree within rounding, and are whole; only rank 0 speaks and writes."""
    words = ["--variant", variant, *quick, "--cache", big["path"], "--tokens", 64 * 20, "--width", 61]
    words += ["--set", "encoder_product=float32"]
    sae_train(*words, "--name", "one")
    first, second = launch(spawn, words, code=TWICE)
    start = json.loads((tmp_path / "runs/one/result.json").read_text())
    for name in ("two", "split"):
        assert f"next: sae-eval {tmp_path / 'runs' / name}" in first and second.strip() == ""
        for file in (f"{variant}/sae_weights.safetensors", f"checkpoints/step_000000020/{variant}.safetensors"):
            one, other = (load_file(tmp_path / "runs" / run / file) for run in ("one", name))
            assert one.keys() == other.keys()
            for key in one:
                assert one[key].shape == other[key].shape
                assert torch.allclose(one[key].double(), other[key].double(), rtol=1e-3, atol=1e-4), (name, key)
        end = json.loads((tmp_path / "runs" / name / "result.json").read_text())
        assert end["tokens"] == start["tokens"]
        assert end["saes"][variant]["l0"] == pytest.approx(start["saes"][variant]["l0"], rel=1e-2)


@pytest.mark.slow
def test_a_split_dictionary_begins_where_another_ended(big, spawn, sae_train, quick, tmp_path):
    words = ["--variant", "jumprelu", *quick, "--cache", big["path"], "--width", 61, "--set", "encoder_product=float32"]
    sae_train(*words, "--tokens", 64 * 20, "--name", "source")
    words += ["--init", "source", "--tokens", 64 * 4]
    sae_train(*words, "--name", "one")
    launch(spawn, [*words, "--name", "two", "--set", "course.shard_width=true"])
    one, two = (load_file(tmp_path / "runs" / name / "jumprelu/sae_weights.safetensors") for name in ("one", "two"))
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=1e-3, atol=1e-4), key


SPREAD = """
import os, signal, sys
from rich.console import Console
from saemill.train.cli import main
from saemill.train.cli_support import report_errors
from saemill.train.engine.fleet_of_saes import Fleet
from saemill.train.train_runs import open_process, train_all

words = main.make_context("sae-train", sys.argv[1:]).params
take_step = Fleet.step

def die_at_12(self, draw):
    if process.group.rank == 1 and self.steps_taken == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(self, draw)

with report_errors(), open_process("cpu", Console(soft_wrap=True), spread=True) as process:
    list(train_all({**words, "name": "two"}, process))
    Fleet.step = die_at_12
    list(train_all({**words, "name": "lost"}, process))
"""

FLEET = ["--variant", "topk", "--variant", "batchtopk", "--variant", "temporal", "--set", "topk.width=61"]
FLEET += ["--set", "course.checkpoint_every_steps=5", "--set", "course.metrics_every_steps=4"]
WILD = ["--variant", "standard", "--set", "standard.width=500", "--set", "standard.optim.lr=1e30"]
WILD += ["--set", "standard.optim.warmup_steps=0"]


def test_spread_saes_have_the_bits_of_one_process_and_outlive_a_lost_one(
    big, spawn, sae_train, quick, same_bits, tmp_path
):
    """Three SAEs in two processes, to the end, beside a large one that diverges and had a process to itself; and again
    until one process is killed in a step: the other says so, and the last checkpoint goes on in a single process."""
    words = [*FLEET, *WILD, *quick, "--cache", big["path"], "--tokens", 64 * 20]
    one, two, lost = (tmp_path / "runs" / name for name in ("one", "two", "lost"))
    sae_train(*words, "--name", "one", code=1)
    first, _ = launch(spawn, words, codes=(1, -9), code=SPREAD)
    same_bits(two, one)
    config, results = (
        [json.loads((run / name).read_text()) for run in (one, two)] for name in ("config.json", "result.json")
    )
    assert [told["provenance"].pop(own) for told in config for own in ("date", "run_id")]  # of which each has its own
    assert [told["provenance"]["hardware"].pop("processes") for told in config] == [1, 2]
    assert config[0] == config[1]
    moving = {"run", "seconds", "tokens_per_second", "first_wait_seconds", "waiting_share", "saes"}
    assert {k: v for k, v in results[0].items() if k not in moving} == {
        k: v for k, v in results[1].items() if k not in moving
    }
    assert list(results[1]["saes"]) == ["topk", "batchtopk", "temporal"] and list(results[1]["diverged"]) == [
        "standard"
    ]
    for label, sae in results[0]["saes"].items():
        own = {"folder": str(two / label), "step_seconds": results[1]["saes"][label]["step_seconds"]}
        assert {**sae, **own} == results[1]["saes"][label]
    assert "in process 0" in first and "in process 1" in first
    assert "another process of the run is gone" in first and f"sae-train --resume {lost}" in first
    assert "Traceback" not in first
    assert [path.name for path in sorted((lost / "checkpoints").iterdir())] == ["step_000000005", "step_000000010"]
    assert "continuing after step 10" in sae_train("--resume", "lost", "--device", "cpu", code=1).output
    same_bits(lost, one)


LOST = """
import os, signal, sys
from saemill.train.cli import main
from saemill.train.engine.step import Trainee

look = Trainee._require_finite

def die_at_12(self, *seen):
    if os.environ["RANK"] == "1" and self.step_index == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return look(self, *seen)

Trainee._require_finite = die_at_12
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_split", ["false", "true"])
def test_a_process_lost_between_the_sums_of_a_step_ends_the_other(big, spawn, sae_train, quick, tmp_path, is_split):
    words = ["--variant", "topk", *quick, "--cache", big["path"], "--tokens", 64 * 20, "--name", "lost"]
    words += ["--set", "course.checkpoint_every_steps=5", "--set", f"course.shard_width={is_split}"]
    first, _ = launch(spawn, words, codes=(1, -9), code=LOST)
    assert "another process of the run is gone" in first and "Traceback" not in first
    assert f"The last checkpoint is intact. Resume with: sae-train --resume {tmp_path / 'runs/lost'}" in first
    assert "continuing after step 10" in sae_train("--resume", "lost", "--device", "cpu").output


PULSE = """
import os, signal, sys, time
import torch.distributed as dist
from saemill.train.parallel import processes

processes.BEAT_SECONDS = processes.GRACE_SECONDS = processes.LEAVING_SECONDS = 0.1
processes.Pulse.is_exiting = "exiting" in sys.argv
dist.init_process_group("gloo")
group = processes.Processes()
group.begin_pulse()
group.any(False)
if "lost" in sys.argv:
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)  # as on a GPU, for a sum that does not end
time.sleep(group.rank)  # the first ends before the others, who are not missed
group.close()
print("ended")
"""


def test_a_process_that_waits_on_its_gpu_for_one_that_is_lost_ends(spawn):
    """There a sum raises nothing: the run stood still until somebody looked. So may one that noticed by itself, where
    a thread of its own waits for the GPU."""
    for words in (["lost"], ["lost", "exiting"]):
        first, _ = launch(spawn, words, codes=(1, -9), code=PULSE)
        assert "error: another process of the run is gone" in first and "sae-train --resume continues" in first
    assert all(said.strip() == "ended" for said in launch(spawn, [], code=PULSE))


FAILS = """
import os, time
import torch.distributed as dist
from saemill.train.cli import main
from saemill.train.engine.fleet_of_saes import Fleet
from saemill.train.errors import TrainError

take_step = Fleet.step

def fail_at_12(self, draw):
    if os.environ["RANK"] == "1" and self.steps_taken == 12:
        raise TrainError("mine alone")
    return take_step(self, draw)

Fleet.step = fail_at_12
dist.destroy_process_group = lambda: time.sleep(1000)  # as NCCL's, which waits for all processes of a machine
main()
"""


def test_an_error_of_one_process_alone_is_told_and_ends_all(big, spawn, quick, tmp_path):
    words = ["--variant", "topk", *quick, "--cache", big["path"], "--tokens", 64 * 20, "--name", "lost"]
    first, second = launch(spawn, words, codes=(1, 1), code=FAILS)
    assert "error: mine alone" in second and "another process of the run is gone" in first
    assert "Traceback" not in first + second


@pytest.mark.slow
def test_spread_saes_go_on_in_any_number_of_processes(big, spawn, sae_train, quick, same_bits, tmp_path, rewind):
    words = [*FLEET, *quick, "--cache", big["path"], "--tokens", 64 * 20]
    sae_train(*words, "--name", "one")
    shutil.copytree(tmp_path / "runs/one", tmp_path / "runs/begun")
    rewind(tmp_path / "runs/begun")
    first, *others = launch(spawn, ["--resume", "begun", "--spread", "--device", "cpu"], codes=(0, 0, 0))
    assert "continuing after step 15" in first and others == ["", ""]
    same_bits(tmp_path / "runs/begun", tmp_path / "runs/one")
    for said in launch(spawn, [*words, "--spread", "--name", "four"], codes=(1, 1, 1, 1)):
        assert "expected at least one SAE for each of 4 processes, found 3" in said
    assert not (tmp_path / "runs/four").exists()


REFUSED = """
import sys
from contextlib import suppress
from dataclasses import replace
from rich.console import Console
from saemill.train.cli import main
from saemill.train.cli_support import report_errors
from saemill.train.parallel.processes import SOLO
from saemill.train.train_runs import open_process, train_all

words = main.make_context("sae-train", sys.argv[1:]).params
resumed = main.make_context("sae-train", ["--resume", "begun", "--out", words["out"]]).params
with open_process("cpu", Console(soft_wrap=True)) as process:
    with suppress(SystemExit), report_errors():
        list(train_all({**words, "name": "mine"}, process))
    with suppress(SystemExit), report_errors():
        split = (*words["set"], "course.shard_width=true")
        list(train_all({**words, "variant": ("tiered",), "set": split}, process))
    with report_errors():
        list(train_all(resumed, replace(process, team=SOLO)))
"""


def test_what_one_process_is_refused_ends_both(big, spawn, sae_train, quick, rewind, tmp_path):
    """Rank 0 alone makes the folder, and alone asks for the log of a run that may be trained already; the other does
    not wait for it. What cannot be split is told before a folder is made."""
    words = ["--variant", "topk", *quick, "--cache", big["path"], "--tokens", 640]
    sae_train(*words, "--variant", "batchtopk", "--name", "begun", "--set", "course.checkpoint_every_steps=5")
    rewind(tmp_path / "runs/begun")
    (tmp_path / "runs/mine").mkdir()
    log = MetricsLog(tmp_path / "runs/begun/metrics.jsonl")
    first, second = launch(spawn, words, codes=(1, 1), code=REFUSED)
    log.close()
    (taken, unsplit, trained), told = (
        [line for line in said.splitlines() if line.startswith("error: ")] for said in (first, second)
    )
    assert "already exists" in taken and "another process is training" in trained
    assert "course.shard_width is for SAEs without parts that need all latents" in unsplit
    assert told[1] == unsplit and all("another process of the run" in told[place] for place in (0, 2))
    assert "Traceback" not in first + second
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"mine", "begun"}


class Unequal(Group):
    """Two processes of which the other sees a newer checkpoint."""

    size = 2

    def texts(self, value):
        return [value, json.dumps(["step_000000100"])]


def test_processes_that_found_other_checkpoints_stop(big, sae_train, quick, rewind, tmp_path):
    sae_train(*FLEET, *quick, "--cache", big["path"], "--tokens", 64 * 20, "--name", "begun")
    rewind(tmp_path / "runs/begun")
    process = Process(Unequal(), SOLO, torch.device("cpu"), Console(file=io.StringIO()))
    with Store.open(big["path"]) as store, pytest.raises(CheckpointDamaged, match="step_000000015, step_000000100"):
        resume_run(RunFolder(tmp_path / "runs/begun"), store, process).__enter__()


def test_who_writes_no_checkpoint_copies_none():
    """Processes that share rows have the same weights; a copy in each is as much host memory again."""
    asked = []
    fleet = SimpleNamespace(state=lambda: asked.append("state"), look=lambda: asked.append("look"), lends_state=True)
    team = SimpleNamespace(rank=1)
    saver = Saver.__new__(Saver)
    saver._writer, saver._fleet, saver._team = SimpleNamespace(finish=lambda: None), fleet, team
    saver._course = CourseConfig()
    saver.save(5)
    assert asked == ["look"]
