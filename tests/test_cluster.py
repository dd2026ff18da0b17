"""The recipes of docs/cluster/ on a real Slurm: one node, from Debian's packages, started for the test.

`make test-cluster` installs it. Where it is not installed, or this user may not start it, the tests skip.
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
from saemill.cache_schema.verify import digest

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


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


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
    """Three workers, one of which is lost and requeued; two processes that train; a task for each SAE."""
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
