"""The recipes of docs/cluster/ with stubs of what they call, and on a real Slurm: one node, started for the test.

`make test-cluster` installs it from Debian's packages. Where it is not installed, or this user may not start it, the
test that needs it skips.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from saemill.cache_schema import Store
from saemill.cache_schema.verify_and_repair import digest

from .free_port import free_port

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "docs" / "cluster"
DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
SlurmctldPort={port}
SlurmdPort={next_port}
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_res
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,requeue_delay=0
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which sbatch finds a running cluster."""
    if os.geteuid() != 0 or not all(map(shutil.which, DAEMONS)):
        pytest.skip("Slurm is not installed, or may not be started: make test-cluster, as root")
    home = Path(tempfile.mkdtemp(prefix="slurm"))
    home.chmod(0o755)
    for folder in ("state", "spool"):
        (home / folder).mkdir()
    (home / "munge.key").write_bytes(os.urandom(1024))
    (home / "munge.key").chmod(0o400)
    host, port = socket.gethostname().split(".")[0], free_port()
    (home / "slurm.conf").write_text(CONFIG.format(host=host, home=home, port=port, next_port=free_port()))
    places = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed", "key-file": "key"}
    subprocess.run(["munged", "--force", *(f"--{o}={home}/munge.{n}" for o, n in places.items())], check=True)
    environment = {**os.environ, "SLURM_CONF": str(home / "slurm.conf")}
    for daemon in DAEMONS[1:]:
        subprocess.run([daemon, "-f", home / "slurm.conf"], check=True, env=environment)
        time.sleep(1)
    yield environment
    for name in ("slurmd", "slurmctld", "munge"):
        os.kill(int((home / f"{name}.pid").read_text()), signal.SIGTERM)
    time.sleep(1)
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Path:
    """This tree's commands on the path, whatever is installed."""
    folder = tmp_path_factory.mktemp("bin")
    modules = {"sae-harvest": "harvest.cli", "sae-train": "train.cli", "sae-eval": "evaluate.cli"}
    for name, module in modules.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m saemill.{module} "$@"\n')
        (folder / name).chmod(0o755)
    (folder / "torchrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    (folder / "torchrun").chmod(0o755)
    return folder


STUBS = {
    "sae-harvest": 'echo "harvest $*" >> log',
    "sae-eval": 'echo "eval $*" >> log',
    "scontrol": 'case $1 in show) echo node1 ;; *) echo "scontrol $*" >> log ;; esac',
    "srun": 'echo $$ > step; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    # srun's first process; where the cluster signals all of a step, torchrun too; and it may find some ended
    "scancel": 'echo "scancel $*" >> log; kill -USR1 "$(cat step)"; kill -USR1 "$(cat torchrun_pid)"; exit 1',
    "torchrun": """\
echo "${@#--rdzv-*}" | sed 's/.*sae-train/train/' >> log
[ "${FAILS:-}" ] && exit 1
[ "${FINISHED:-}" ] && mkdir -p "$RUNS/$NAME" && touch "$RUNS/$NAME/config.json" && exit 0
trap 'echo saved >> log; exit 143' TERM
echo $$ > torchrun_pid.tmp && mv torchrun_pid.tmp torchrun_pid
while :; do sleep 0.05; done""",
}


@pytest.fixture
def stubs(tmp_path) -> dict[str, str]:
    """An environment in which recipes run in this folder, without Slurm, and write what they do into `log`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, does in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{does}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "STORE": "store", "RUNS": "runs", "NAME": "wide"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1"}
    return environment | {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "17", "SLURM_ARRAY_TASK_ID": "19"}


def begin_recipe(name: str, stubs: dict[str, str], home: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["bash", str(RECIPES / name), *words], cwd=home, env=stubs)


def log_of(home: Path) -> list[str]:
    return (home / "log").read_text().splitlines()


def test_a_run_whose_time_is_up_saves_and_is_requeued(stubs, tmp_path):
    job = begin_recipe("train.sbatch", stubs, tmp_path, "--variant", "topk", "--k=4", "--spread", "--device", "cuda")
    while not (tmp_path / "torchrun_pid").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 0
    begun = "train --out runs --cache store --name wide --variant topk --k=4 --spread --device cuda"
    assert log_of(tmp_path) == [begun, "scancel --signal=USR1 7", "saved", "scontrol requeue 7"]


def test_a_requeued_run_goes_on_as_it_was_launched_and_ends(stubs, tmp_path):
    (tmp_path / "runs/wide").mkdir(parents=True)
    (tmp_path / "runs/wide/config.json").touch()
    words = ["--variant", "topk", "--spread", "--k=4", "--device", "cuda", "--no-plots"]
    assert begin_recipe("train.sbatch", stubs | {"FINISHED": "1"}, tmp_path, *words).wait() == 0
    assert begin_recipe("train.sbatch", stubs | {"FINISHED": "1"}, tmp_path, "--k=4").wait() == 0
    resumed = "train --out runs --resume wide"
    (tmp_path / "runs/wide/result.json").touch()
    assert begin_recipe("train.sbatch", stubs, tmp_path, *words).wait() == 0
    assert log_of(tmp_path) == [f"{resumed} --spread --device cuda --no-plots", resumed]


def test_a_run_that_is_there_takes_no_other_settings(stubs, tmp_path):
    """They were dropped, and the old run went on, or had ended and was evaluated."""
    stubs["FINISHED"] = "1"
    words = ["--variant", "topk", "--set", "optim.lr=1e-3"]
    assert begin_recipe("train.sbatch", stubs, tmp_path, *words, "--spread").wait() == 0
    assert begin_recipe("train.sbatch", stubs, tmp_path, *words, "--device", "cuda").wait() == 0
    assert begin_recipe("train.sbatch", stubs, tmp_path).wait() == 0
    assert begin_recipe("train.sbatch", stubs, tmp_path, "--variant", "jumprelu").wait() == 1
    (tmp_path / "runs/wide/result.json").touch()
    assert begin_recipe("train.sbatch", stubs, tmp_path, "--variant", "jumprelu").wait() == 1
    resumed = "train --out runs --resume wide"
    begun = "train --out runs --cache store --name wide --variant topk --set optim.lr=1e-3 --spread"
    assert log_of(tmp_path) == [begun, f"{resumed} --device cuda", resumed]


def test_a_run_that_another_job_is_beginning_keeps_that_jobs_settings(stubs, tmp_path):
    """Or the job that began it, requeued, is refused for its own settings. Those of a job that failed bind nobody."""
    assert begin_recipe("train.sbatch", stubs | {"FAILS": "1"}, tmp_path, "--variant", "topc").wait() == 1
    job = begin_recipe("train.sbatch", stubs, tmp_path, "--variant", "topk")
    while not (tmp_path / "torchrun_pid").exists():
        assert job.poll() is None
        time.sleep(0.01)
    assert begin_recipe("train.sbatch", stubs | {"FINISHED": "1"}, tmp_path, "--variant", "jumprelu").wait() == 1
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 0
    assert begin_recipe("train.sbatch", stubs | {"FINISHED": "1"}, tmp_path, "--variant", "topk").wait() == 0
    assert begin_recipe("train.sbatch", stubs | {"FINISHED": "1"}, tmp_path, "--variant", "topk").wait() == 0
    begun = "train --out runs --cache store --name wide --variant"
    stopped = ["scancel --signal=USR1 7", "saved", "scontrol requeue 7"]
    told = [f"{begun} topc", f"{begun} topk", *stopped, f"{begun} topk", "train --out runs --resume wide"]
    assert log_of(tmp_path) == told


def test_tasks_of_any_array_are_workers_from_one_on_and_evaluations_keep_what_is_done(stubs, tmp_path):
    for label in ("a", "b"):
        (tmp_path / "my runs/wide" / label).mkdir(parents=True)
        (tmp_path / "my runs/wide" / label / "cfg.json").touch()
    stubs["RUNS"] = "my runs"
    assert begin_recipe("harvest.sbatch", stubs, tmp_path, "--tokens=1M").wait() == 0
    assert begin_recipe("evaluate.sbatch", stubs | {"SLURM_ARRAY_TASK_ID": "2"}, tmp_path).wait() == 0
    assert log_of(tmp_path) == ["harvest --worker 3/4 --out store --tokens=1M", "eval wide/b --resume --runs my runs"]


class Cluster:
    """Submits recipes and waits for them."""

    def __init__(self, slurm: dict[str, str], commands: Path, home: Path) -> None:
        roots = os.pathsep.join(path for path in sys.path if path)
        self.home = home
        self.environment = {**slurm, "PATH": f"{commands}:{slurm['PATH']}", "PYTHONPATH": roots}
        self.environment |= {"OMP_NUM_THREADS": "1", "STORE": str(home / "store"), "RUNS": str(home / "runs")}
        self.environment |= {"NAME": "wide", "PROCESSES": "2"}

    def ask(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, cwd=self.home, env=self.environment)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout.strip()

    def submit(self, recipe: str, options: list[str], words: list[str]) -> str:
        return self.ask("sbatch", "--parsable", *options, str(RECIPES / recipe), *words)

    def tasks(self, job: str) -> list[str]:
        return self.ask("squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={job}").splitlines()

    def wait(self, job: str, seconds: int = 900) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            shown = self.ask("scontrol", "show", "job", job, "--oneliner").splitlines()
            states = [line.split("JobState=")[1].split()[0] for line in shown]
            if all(state in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL") for state in states):
                assert set(states) == {"COMPLETED"}, (states, self.logs())
                return
            time.sleep(1)
        raise TimeoutError(f"{job} has not ended: {self.tasks(job)} {self.logs()}")

    def logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(self.home.glob("*.log")))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_recipes_harvest_train_and_evaluate(slurm, commands, tmp_path):
    """Three workers, one of which is lost and requeued; a task for each SAE; two processes whose time is up."""
    cluster = Cluster(slurm, commands, tmp_path)
    words = ["--model", "pocket", "--layer", "3", "--tokens", "60k", "--device", "cpu"]
    harvest = cluster.submit("harvest.sbatch", ["--array=1-3"], words)
    while not (tmp_path / "store" / "zarr.json").exists():
        assert cluster.tasks(harvest), cluster.logs()
        time.sleep(0.5)
    lost = [task.split()[0] for task in cluster.tasks(harvest) if task.endswith("RUNNING")]
    if lost:
        cluster.ask("scontrol", "requeue", lost[-1])
    cluster.wait(harvest)
    with Store.open(tmp_path / "store") as store:
        assert store.committed.all()
        found = digest(store)
    subprocess.run(
        [commands / "sae-harvest", *words, "--out", tmp_path / "alone"],
        check=True,
        capture_output=True,
        env=cluster.environment,
    )
    with Store.open(tmp_path / "alone") as store:
        assert digest(store) == found

    words = ["--variant", "topk", "--grid", "k=4,8", "--width", "64", "--epochs", "1", "--device", "cpu"]
    cluster.wait(cluster.submit("train.sbatch", ["--nodes=1"], words))
    assert set(json.loads((tmp_path / "runs/wide/result.json").read_text())["saes"]) == {"topk_k4", "topk_k8"}
    cluster.wait(cluster.submit("evaluate.sbatch", ["--array=1-2"], ["--evals", "decoder_cosine", "--device", "cpu"]))
    results = sorted((tmp_path / "runs/wide/evals/decoder_cosine").glob("*.json"))
    assert [path.name.split("_eval")[0] for path in results] == ["topk_k4", "topk_k8"]

    cluster.environment["NAME"] = "long"
    words = ["--variant", "topk", "--k", "4", "--width", "64", "--epochs", "200", "--device", "cpu", "--no-plots"]
    job = cluster.submit("train.sbatch", ["--nodes=1"], words)
    while not (tmp_path / "runs/long/metrics.jsonl").exists():
        assert cluster.tasks(job), cluster.logs()
        time.sleep(0.5)
    cluster.ask("scancel", "--batch", "--signal=TERM", job)  # as Slurm does two minutes before the time is up
    cluster.wait(job)
    assert "Restarts=1" in cluster.ask("scontrol", "show", "job", job, "--oneliner"), cluster.logs()
    log = (tmp_path / f"train_{job}.log").read_text()
    assert log.index("stopped after step") < log.index("continuing after step")
    assert (tmp_path / "runs/long/result.json").exists()
