"""Write the golden runs: one stopped halfway, with its checkpoints, and a finished one, with its SAE.

Run by hand, once for each format of runs, checkpoints and saved SAEs, which must remain readable. The test rebuilds the
store that they were trained on from the same seed.
"""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from saemill.cache_schema import Store
from saemill.train.config.run_config import RunRequest
from saemill.train.parallel.processes import SOLO
from saemill.train.run.fill_config_from_store import settle
from saemill.train.run.log_and_show_progress import Watch
from saemill.train.run.process import Process
from saemill.train.run.start_or_resume import Run, begin_run
from saemill.train.train_runs import train

FOLDER = Path(__file__).parent / "runs_1"
SETTINGS = {"layer": 3, "width": 8, "k": 2, "data.batch_tokens": 16, "data.pool_tokens": 32, "course.epochs": 1}
SETTINGS |= {"course.checkpoint_every_steps": 2, "course.metrics_every_steps": 1}
STORE = {"windows": 40, "shard_windows": 8, "layers": (3,), "splits": (28, 34)}  # 12 steps
STOPS_AT = 7


def process() -> Process:
    return Process(SOLO, SOLO, torch.device("cpu"), Console(file=io.StringIO()))


def write(cache: str, folder: Path) -> None:
    """Two runs of one seed: `ended`, and `stopped` before its eighth step."""
    with Store.open(cache) as store:
        settled = settle(RunRequest.of_variants(["topk"], SETTINGS), store)
        with begin_run(settled, store, process(), str(folder), "ended") as run:
            train(run)
        try:
            with begin_run(settled, store, process(), str(folder), "stopped") as run:
                stop_before(run, STOPS_AT)
                train(run)
        except KeyboardInterrupt:
            pass


def stop_before(run: Run, step: int) -> None:
    observe = Watch.observe

    def stopping(at: int, *rest: Any) -> None:
        if at == step:
            raise KeyboardInterrupt
        observe(run.watch, at, *rest)

    run.watch.observe = stopping  # type: ignore[method-assign]


if __name__ == "__main__":
    import subprocess
    import sys

    sys.path.insert(0, str(FOLDER.parents[2]))
    from tests.train.conftest import make_store

    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    os.chdir(FOLDER)
    make_store("store", **STORE)
    write("store", Path())
    command = [sys.executable, "-m", "saemill.evaluate.cli", "ended", "--runs", ".", "--evals", "decoder_cosine"]
    subprocess.run(command, check=True)
    for leftover in (*Path("ended").glob("*.html"), Path("ended/plots"), Path("store")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    for config in Path().glob("*/config.json"):  # without this machine's paths
        config.write_text(config.read_text().replace(str(FOLDER / "store"), "store"))
