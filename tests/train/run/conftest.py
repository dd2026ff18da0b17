"""Runs from the command line, in this process or in one that can be killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from saemill.train.cli import main
from saemill.train.disk.write_and_load_checkpoints import list_checkpoints

QUICK = ["--layer", "3", "--device", "cpu", "--set", "data.batch_tokens=64", "--set", "data.pool_tokens=600"]
QUICK += ["--no-plots"]
TIMING = ("tokens_per_second", "waiting_share")


@pytest.fixture(scope="session")
def big(write_store, tmp_path_factory):
    """A store of 1,000 windows: an epoch has 100 steps of 64 tokens."""
    return write_store(tmp_path_factory.mktemp("stores") / "big", windows=1000, shard_windows=64, splits=(920, 960))


@pytest.fixture
def sae_train(tmp_path):
    """Run the command in this process: `sae_train("--variant", "topk", ...)` returns its result."""

    def call(*words, out=tmp_path / "runs", code=0):
        words = ("--no-plots", "--out", out, *words)
        result = CliRunner().invoke(main, [*map(str, words)], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result

    return call


@pytest.fixture
def rewind(monkeypatch):
    """Turn a finished run of this process into one that was killed after its second-to-last checkpoint."""
    monkeypatch.setattr("saemill.train.run.validate_and_save_results.keep_newest", lambda *_: None)

    def back(run):
        newest, _ = list_checkpoints(run / "checkpoints")
        shutil.rmtree(newest)
        (run / "result.json").unlink()

    return back


@pytest.fixture(scope="module")
def spawn_in():
    """Start the command in a new process: `spawn_in(out, "--variant", "topk", ...)`."""
    processes = []

    def start(out, *words, code="from saemill.train.cli import main; main()", **environment):
        env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
        command = [sys.executable, "-c", code, "--out", str(out), *map(str, words)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def spawn(spawn_in, tmp_path):
    return partial(spawn_in, tmp_path / "runs")


@pytest.fixture(scope="session")
def bits():
    """Everything that a finished run leaves behind, except times."""

    def read(run: Path):
        last = sorted((run / "checkpoints").glob("step_*"))[-1]
        tensors = {path.name: load_file(path) for path in sorted(last.glob("*.safetensors"))}
        tensors |= {str(p.relative_to(run)): load_file(p) for p in sorted(run.glob("*/sae_weights.safetensors"))}
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return tensors, [{k: v for k, v in line.items() if k not in TIMING} for line in lines]

    return read


@pytest.fixture
def same_bits(bits):
    """Assert that two runs left the same behind."""

    def check(one: Path, other: Path):
        (tensors, lines), (expected, expected_lines) = bits(one), bits(other)
        assert tensors.keys() == expected.keys()
        for name, state in expected.items():
            assert state.keys() == tensors[name].keys()
            for key, tensor in state.items():
                assert torch.equal(tensor, tensors[name][key]), f"{name}: {key}"
        assert lines == expected_lines

    return check


@pytest.fixture(scope="session")
def quick():
    """Options for a run of a few seconds."""
    return QUICK
