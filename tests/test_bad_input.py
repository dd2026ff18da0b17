"""Damaged and hostile files of every kind that is read: each is read, or refused by a named error that says what.

A corpus of small whole files is mutated, input after input, within bounded memory. `make test` tries a few
hundred; `make test-slow` as many as FUZZ says, 20,000 where it says nothing. Mutated GGUF files are in
tests/harvest/model/test_gguf_file.py; stores that are then read through in tests/cache_schema/test_fuzz.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from saemill.cache_schema import StoreError
from saemill.cache_schema.commits import read_index, read_record
from saemill.cache_schema.disk_and_cloud_files import LocalFiles
from saemill.cache_schema.open_and_check_root import read_root
from saemill.cache_schema.strict_json import StrictError, from_json, to_json
from saemill.cache_schema.token_counts_and_summary import read_summary
from saemill.evaluate.context.write_and_read_results import describe_differences, is_whole, metric_of, read_result
from saemill.evaluate.errors import EvalError
from saemill.evaluate.evals.browser import evaluation as browser
from saemill.evaluate.evals.browser.browser_folder import write_data
from saemill.evaluate.output.figures.records import thinned_log
from saemill.train.config.run_config import CourseConfig, DataConfig, RunConfig, RunRequest, read_run_config
from saemill.train.data.scaling import unit_stats
from saemill.train.disk import write_and_load_checkpoints
from saemill.train.disk.formats import WRITERS
from saemill.train.disk.plain_form import plain_sae
from saemill.train.disk.sae_lens_folder import read_config, save_sae
from saemill.train.disk.write_and_load_checkpoints import Standing, load_checkpoint, save_checkpoint
from saemill.train.errors import TrainError
from saemill.train.kit.variant_registry import config_type
from saemill.train.run.find_and_load_sae import read_folder
from saemill.train.run.init_from_trained_sae import source_of
from saemill.train.run.run_folder import RunFolder, cache_of

from . import mutations

GOLDEN = Path(__file__).parent / "golden" / "store_raw"
NAMED = (StoreError, TrainError, EvalError)
D, F = 4, 6
NOT_PLAIN: dict[str, dict[str, Any]] = {
    "clt": {"layers": (0, 1), "k": 2.0},
    "positional": {"base": "topk", "k": 2, "ranges": 2, "context": 8, "scattered": True},
}
VARIANTS = {"topk": {"k": 2}, "jumprelu": {"target_l0": 2.0}, "gated": {}, "temporal": {"base": "topk", "k": 2}}
VARIANTS |= NOT_PLAIN
LONG = int(os.environ.get("FUZZ", "20000"))


@dataclass(frozen=True)
class Target:
    """A file, how it is mutated, and all that reads it."""

    file: Path
    read: Callable[[], Any]
    seal: Callable[[Any], None] = lambda _: None
    kind: str = "json"


def seal_state(document: Any) -> None:
    """The digest of where a run stands must not be what hides every later check."""
    try:
        found = from_json(write_and_load_checkpoints._State, document)
        document["digest"] = found.own_digest()
    except (StrictError, TypeError, ValueError, RecursionError):
        return


def make_sae(variant: str, **changes: Any) -> Any:
    config = config_type(variant)(width=F, **changes)
    return config, config.build(D).sae


def write_saes(folder: Path) -> dict[str, tuple[Path, str]]:
    """One of every kind of folder: its path, and the file of its weights."""
    stats, found = unit_stats(D), {}
    for variant, changes in VARIANTS.items():
        config, sae = make_sae(variant, **changes)
        save_sae(folder / variant, sae, unit_stats(sae.d_in), {"layers": [3]}, to_json(config), variant)
        assert ("needs_side" in read_config(folder / variant)) == (variant in NOT_PLAIN)
        found[variant] = folder / variant, "sae_weights.safetensors"
    plain = plain_sae(make_sae("topk", k=2)[1], stats, stats)
    for kind, weights in {"sparsify": "sae.safetensors", "dictionary_learning": "ae.safetensors"}.items():
        WRITERS[kind](folder / kind, plain, {"layers": [3], "model_name": "m"})
        found[kind] = folder / kind, weights
    return found


def use_sae(folder: Path) -> None:
    sae = read_folder(folder)
    if sae.is_plain:
        sae(torch.zeros(2, sae.d_in))


def read_run(folder: Path) -> None:
    run = RunFolder(folder)
    read_run_config(run.read_config(), str(folder))
    cache_of(run)


def use_result(path: Path) -> None:
    document, settings = read_result(path), {"config": {"windows": 3}, "cache_id": "abc"}
    metric_of(document, "core.l0")
    is_whole(document, settings)
    describe_differences(document, settings)


def write_browser(home: Path) -> dict[str, Any]:
    """What one says of two of the SAEs beside it."""
    saes = [{"label": name, "folder": f"sae_{name}", "sha256": source_of(home / name).sha256} for name in VARIANTS][:2]
    about = dict.fromkeys(browser.SHARED, "x") | {"run": "saes", "config": {"windows": 3}, "saes": saes}
    write_data(home / "browser", "words", {"ids": np.arange(3, dtype=np.uint32)})
    for sae in saes:
        write_data(home / "browser", f"{sae['folder']}/columns", {})
    return about


def use_browser(home: Path, file: Path, about: dict[str, Any], made: Path) -> None:
    """As a browser of other SAEs of the run takes over those that are shown already."""
    (home / "browser/data/run.js").write_bytes(b'saemill("run",' + file.read_bytes() + b");\n")
    shutil.rmtree(made, ignore_errors=True)
    browser.is_there(SimpleNamespace(home=home, label="topk"))  # type: ignore[arg-type]
    told: Any = SimpleNamespace(say=lambda _: None, path=made, include=lambda _: None)
    kept = browser.keep_others(told, home, told, about, [], told)
    assert [sae["folder"] for sae in kept] == sorted((path.name for path in made.glob("data/*")), reverse=True)


def targets_in(home: Path) -> dict[str, Target]:
    shutil.copytree(GOLDEN, home / "store")
    files = LocalFiles(home / "store")
    manifest = read_root(files).manifest
    found = {
        "root": Target(home / "store/zarr.json", lambda: read_root(files), mutations.reseal_store),
        "index": Target(home / "store/commits/index.json", lambda: read_index(files, manifest)),
        "record": Target(home / "store/commits/00001.json", lambda: read_record(files, manifest, 1)),
        "summary": Target(home / "store/stats/summary.json", lambda: read_summary(files, manifest)),
    }
    for name, (folder, weights) in write_saes(home / "saes").items():
        config = "config.json" if (folder / "config.json").exists() else "cfg.json"
        found[f"{name}, {config}"] = Target(folder / config, lambda folder=folder: use_sae(folder))
        found[f"{name}, weights"] = Target(folder / weights, lambda folder=folder: use_sae(folder), kind="safetensors")
    checkpoints = home / "run/checkpoints"
    standing = Standing(step=5, metrics_bytes=7, seconds=1.5, waited_seconds=0.1, same_pairs=3, pairs=9)
    save_checkpoint(checkpoints, standing, {"topk": {"w": torch.zeros(3)}})
    place = checkpoints / "step_000000005"
    found["checkpoint, state.json"] = Target(place / "state.json", lambda: load_checkpoint(checkpoints), seal_state)
    weights = place / "topk.safetensors"
    found["checkpoint, weights"] = Target(weights, lambda: load_checkpoint(checkpoints), kind="safetensors")
    members = tuple(RunRequest.of_variants(["topk"], {"layer": 3}).members(lambda _: {}, {"resid": (3,)}))
    config = RunConfig(DataConfig(pool_tokens=100), CourseConfig(tokens=100), members).to_json()
    config |= {"cache": {"url": "store", "cache_id": "0" * 32}, "total_steps": 3}
    (home / "run/config.json").write_text(json.dumps(config))
    found["run, config.json"] = Target(home / "run/config.json", lambda: read_run(home / "run"))
    result = {"eval_type_id": "core", "eval_result_metrics": {"core": {"l0": 3.0}}, "eval_result_details": []}
    result |= {"saemill": {"settings": {"config": {"windows": 3}, "cache_id": "abc"}, "missing": None}}
    path = home / "run/evals/core/topk_eval_results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    found["result"] = Target(path, lambda: use_result(path))
    about, shown, made = write_browser(home / "saes"), home / "run.js", home / "made"
    shown.write_text(json.dumps(about))
    found["browser"] = Target(shown, lambda: use_browser(home / "saes", shown, about, made))
    log = home / "run/metrics.jsonl"
    log.write_text('{"sae": "topk", "step": 0, "loss": 1.0}\n')
    found["log"] = Target(log, lambda: thinned_log(log))
    return found


@pytest.fixture(scope="module")
def targets(memory_folder) -> dict[str, Target]:
    found = targets_in(memory_folder)
    for target in found.values():
        target.read()
    return found


def try_input(target: Target, whole: bytes, seed: str) -> bool:
    """Whether the input was read; refused by name is the other good end."""
    choose = random.Random(seed)
    if target.kind == "safetensors":
        target.file.write_bytes(mutations.mutate_tensors(whole, choose))
    else:
        target.file.write_bytes(mutations.mutate(whole, choose, target.seal))
    try:
        target.read()
    except NAMED as error:
        assert str(error)
        return False
    except Exception as error:
        error.add_note(f"input {seed!r}: {target.file.read_bytes()[:2000]!r}")
        raise
    return True


def try_many(targets: dict[str, Target], tell: Any, inputs: int, first: int) -> None:
    began, read, each = time.perf_counter(), 0, -(-inputs // len(targets))
    with mutations.bounded_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's and torch's, of odd numbers
        for name, target in targets.items():
            whole = target.file.read_bytes()
            try:
                for number in range(first, first + each):
                    read += try_input(target, whole, f"{name} {number}")
            finally:
                target.file.write_bytes(whole)
    total, seconds = each * len(targets), time.perf_counter() - began
    said = f"{len(targets)} kinds of files in {seconds:,.0f} s, {total - read:,} refused by name"
    tell(said, {"damaged file": total})


def test_mutated_files_are_read_or_refused_by_name(targets, tell):
    try_many(targets, tell, inputs=400, first=0)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(6 * 3600)
def test_mutated_files_are_read_or_refused_by_name_for_long(targets, tell):
    try_many(targets, tell, inputs=LONG, first=random.randrange(10**9))
