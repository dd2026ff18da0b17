"""What other versions wrote, what they are told, and what a release installs.

Stores of every format are in tests/golden/store_*, the matrix with older readers in
tests/cache_schema/test_golden_store.py; here are the run, its checkpoints, its SAE and its results, and the
wheel, the lock and the bill of materials.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from packaging.requirements import Requirement

from saemill.evaluate.context.write_and_read_results import metric_of, read_result
from saemill.evaluate.errors import ResultFromLater
from saemill.train import load_sae
from saemill.train.cli import main as sae_train
from saemill.train.disk.write_and_load_checkpoints import load_checkpoint
from saemill.train.errors import CheckpointDamaged

from .golden.make_run import STORE
from .test_house import copy_of_the_sources
from .train.conftest import make_store

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "tests" / "golden" / "runs_1"
LINE = re.compile(r"([a-z0-9.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")
RESULT = "ended/evals/decoder_cosine/topk_eval_results.json"


@pytest.fixture
def runs(tmp_path) -> Path:
    """A copy of the golden runs, with the store that they were trained on made anew."""
    shutil.copytree(RUNS, tmp_path / "runs")
    make_store(tmp_path / "store", **STORE)
    return tmp_path / "runs"


def test_a_run_of_format_1_goes_on_and_ends(runs):
    words = ["--resume", "stopped", "--out", str(runs), "--cache", str(runs.parent / "store"), "--device", "cpu"]
    done = CliRunner().invoke(sae_train, [*words, "--no-plots"], catch_exceptions=False)
    assert done.exit_code == 0 and "continuing after step 6" in done.output, done.output
    found, ended = (json.loads((runs / name / "result.json").read_text()) for name in ("stopped", "ended"))
    assert found["steps"] == ended["steps"] == 10
    assert found["saes"]["topk"]["explained_variance"] == pytest.approx(
        ended["saes"]["topk"]["explained_variance"], abs=0.05
    )


def test_a_checkpoint_of_format_2_an_sae_and_a_result_of_format_1_are_read():
    found = load_checkpoint(RUNS / "stopped" / "checkpoints")
    assert found is not None and (found.standing.step, found.complaints) == (6, ())
    sae = load_sae("ended", RUNS)
    assert (sae.d_in, sae.num_latents) == (16, 8) and torch.isfinite(sae(torch.ones(2, 16))).all()
    assert metric_of(read_result(RUNS / RESULT), "decoder_cosine.mean") == pytest.approx(0.335, abs=1e-3)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_runs_checkpoints_and_results_of_a_later_format_are_refused_by_their_number(runs):
    edit(runs / "stopped/config.json", format=2)
    words = ["--resume", "stopped", "--out", str(runs), "--cache", str(runs.parent / "store")]
    done = CliRunner().invoke(sae_train, words)
    assert done.exit_code == 1 and "config.json has format 2; this saemill reads format 1. Update" in done.output
    for state in (runs / "stopped/checkpoints").glob("*/state.json"):
        edit(state, format=3)
    with pytest.raises(CheckpointDamaged, match="expected format 2, found 3: update saemill"):
        load_checkpoint(runs / "stopped/checkpoints")
    ours = json.loads((runs / RESULT).read_text())["saemill"]
    edit(runs / RESULT, saemill={**ours, "format": 2})
    with pytest.raises(ResultFromLater, match="written by a later saemill: update"):
        read_result(runs / RESULT)


def locked() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), "each line is name==version --hash=sha256:... and names no place"
    return {match[1]: match[2] for match in found if match is not None}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


OF_CUDA_BUILDS = re.compile(r"triton|(nvidia|cuda)-.+")
"""What a CUDA build of torch needs besides: the lock is for the CPU build, whichever is installed here."""


def test_the_lock_has_the_versions_of_the_constraints_and_all_that_is_needed():
    constraints = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    wanted, found = {plain(name): version for name, version in constraints}, locked()
    assert {plain(name): version.split("+")[0] for name, version in found.items()}.items() <= wanted.items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["s3"]]
    reached, queue = set(), [Requirement(line) for line in named]
    while queue:
        requirement = queue.pop()
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in requirement.extras | {""}
        ):
            name = plain(requirement.name)
            if name not in reached:
                reached.add(name)
                queue += map(Requirement, requires(requirement.name) or [])
    own = {name for name in reached if not OF_CUDA_BUILDS.fullmatch(name)}
    assert own <= {plain(name) for name in found}


def test_the_bill_of_materials_is_that_of_the_lock():
    document = json.loads((ROOT / "sbom.cdx.json").read_text())
    assert {part["name"]: part["version"] for part in document["components"]} == locked()
    assert all(part["licenses"] and part["hashes"] for part in document["components"])
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    page = (ROOT / "docs" / "licences.md").read_text()
    assert all(f"| {name} | {version} | " in page for name, version in locked().items())
    assert "not said" not in page


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_pip_takes_the_lock_with_its_hashes():
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--require-hashes", "-q"]
    done = subprocess.run([*command, "-r", ROOT / "requirements.lock"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PIP = [sys.executable, "-m", "pip"]
QUIET = ["-q", "--no-deps", "--no-index", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("wheel")
    build = [*PIP, "wheel", *QUIET, "--no-build-isolation", "-w", home / "out", copy_of_the_sources(home)]
    subprocess.run(build, check=True, cwd=home)
    (found,) = (home / "out").glob("saemill-*.whl")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert found.name == f"saemill-{version}-py3-none-any.whl"
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pipx_runs_a_command_of_the_wheel(wheel, tmp_path):
    """pipx is that of the index; what saemill depends on is this environment's, as one more folder of the user's."""
    subprocess.run([*PIP, "install", "-q", "--target", tmp_path / "pipx", "pipx"], check=True)
    packages = tmp_path / "base" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    places = {"PYTHONUSERBASE": tmp_path / "base", "PYTHONPATH": tmp_path / "pipx", "PIPX_HOME": tmp_path / "home"}
    alone = ["--system-site-packages", "--pip-args=--no-deps"]
    command = [sys.executable, "-m", "pipx", "run", "--spec", wheel, *alone, "sae-store", "--help"]
    environment = {**os.environ, **{name: str(place) for name, place in places.items()}}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and "Usage:" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_wheel_installs_into_a_clean_environment_and_its_commands_run(wheel, tmp_path):
    """Its dependencies are those of this environment; saemill itself is the wheel's alone."""
    place = tmp_path / "venv"
    venv.create(place, with_pip=False)
    subprocess.run([*PIP, "--python", place / "bin/python", "install", *QUIET, wheel], check=True)
    packages = next((place / "lib").glob("python3*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str) -> str:
        command = [str(place / "bin" / words[0]), *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    assert run("python", "-c", "import saemill; print(saemill.__file__)").startswith(str(packages))
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name in scripts:
        assert "Usage:" in run(name, "--help")
    assert "golden" in run("sae-store", "info", str(ROOT / "tests/golden/store_raw"))
    assert "the store is whole" in run("sae-store", "watch", str(ROOT / "tests/golden/store_raw"))
