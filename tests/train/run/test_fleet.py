"""A member of a fleet trains to the bits it has alone."""

import io
import json
import shutil

import fsspec
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from saemill.train.cli import main
from saemill.train.errors import TrainingDiverged
from saemill.train.parallel.processes import SOLO
from saemill.train.run.process import Process
from saemill.train.train_runs import train_all


def final_state(run, label):
    folder = sorted((run / "checkpoints").glob("step_*"))[-1]
    return load_file(folder / f"{label}.safetensors")


def test_members_are_as_if_alone(big, sae_train, quick, tmp_path):
    """Two variants, two sparsities, two seeds: eight SAEs, each equal to its solo run."""
    common = [*quick, "--cache", big["path"], "--tokens", 1280]
    sae_train("--variant", "topk", "--variant", "batchtopk", "--grid", "k=2,4", "--grid", "seed=0,1", *common)
    fleet = tmp_path / "runs/run_1"
    labels = sorted(path.parent.name for path in fleet.glob("*/cfg.json"))
    assert len(labels) == 8 and "topk_k2_seed1" in labels
    for variant, k, seed in (("topk", 2, 1), ("batchtopk", 4, 0)):
        name = f"alone_{variant}"
        sae_train("--variant", variant, "--k", k, "--seed", seed, *common, "--name", name)
        alone = final_state(tmp_path / "runs" / name, variant)
        member = final_state(fleet, f"{variant}_k{k}_seed{seed}")
        assert alone.keys() == member.keys()
        assert all(torch.equal(alone[key], member[key]) for key in alone)


def test_one_that_diverges_costs_the_others_nothing(big, sae_train, quick, same_bits, tmp_path, rewind):
    """It has no SAE and no number, log and results say so, and the command fails. Resumed, it is the same again."""
    common = ["--variant", "topk", *quick, "--cache", big["path"], "--tokens", 1280]
    common += ["--set", "optim.warmup_steps=0", "--set", "course.checkpoint_every_steps=5"]
    said = sae_train(*common, "--grid", "lr=1e-3,1e30", code=1).output
    assert "their activations are finite: training diverged" in said and "The others continue without it" in said
    error = "topk_lr1e+30: its loss was not finite in step 1: training diverged"
    assert f"error: {error}. The other SAEs of run_1 are complete" in said.splitlines()[-1]
    run, resumed = tmp_path / "runs/run_1", tmp_path / "runs/resumed"
    shutil.copytree(run, resumed)
    sae_train(*common, "--lr", 1e-3, "--name", "alone")
    alone, member = final_state(tmp_path / "runs/alone", "topk"), final_state(run, "topk_lr0.001")
    assert alone.keys() == member.keys() and all(torch.equal(alone[key], member[key]) for key in alone)
    left = final_state(run, "topk_lr1e+30")
    assert left["step"] == 1 and all(left[f"sae.{name}"].isfinite().all() for name in ("W_enc", "W_dec"))
    result = json.loads((run / "result.json").read_text())
    assert {label: f"{label}: {why}" for label, why in result["diverged"].items()} == {"topk_lr1e+30": error}
    assert list(result["saes"]) == ["topk_lr0.001"] and not (run / "topk_lr1e+30").exists()
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["sae"] == "topk_lr1e+30" and last["diverged"] in error and "loss" not in last
    rewind(resumed)
    assert error in sae_train("--resume", "resumed", "--device", "cpu", code=1).output.splitlines()[-1]
    same_bits(resumed, run)


@pytest.mark.parametrize("is_spread", [False, True])
def test_every_process_says_that_all_diverged(big, quick, threads, tmp_path, is_spread):
    """And none that the run could go on: what it could go on with has diverged too."""
    words = ["--variant", "topk", *quick, "--cache", big["path"], "--tokens", 64, "--grid", "k=3,4", "--lr", 1e39]
    words = main.make_context("sae-train", [*map(str, words), "--out", str(tmp_path)]).params
    ranks, run = threads(2)

    def end(at):
        team = SOLO if is_spread else ranks[at]
        process = Process(ranks[at], team, torch.device("cpu"), Console(file=io.StringIO()))
        with pytest.raises(TrainingDiverged, match="topk_k3: .*; topk_k4: .*. Start the run again"):
            list(train_all(words, process))

    run(end)


@pytest.mark.parametrize("is_spread", [False, True])
def test_processes_that_each_read_an_object_store_say_so(big, quick, threads, tmp_path, is_spread):
    """Of a disk the page cache serves all but the first."""
    fsspec.filesystem("memory").put(big["path"], "/stores/big", recursive=True)
    for cache, count in ((big["path"], 2), ("memory://stores/big", 2), ("memory://stores/big", 1)):
        words = ["--variant", "topk", *quick, "--cache", cache, "--tokens", 64, "--grid", "k=3,4"]
        words = main.make_context("sae-train", [*map(str, words), "--out", str(tmp_path)]).params
        (ranks, run), said = threads(count), [io.StringIO() for _ in range(count)]

        def train(at, words=words, ranks=ranks, said=said):
            team = SOLO if is_spread and len(ranks) > 1 else ranks[at]
            console = Console(file=said[at], soft_wrap=True)
            list(train_all(words, Process(ranks[at], team, torch.device("cpu"), console)))

        run(train)
        is_told = "each of 2 processes reads memory://" in said[0].getvalue()
        assert is_told == (count == 2 and cache != big["path"])


def test_each_has_its_own_lines(big, sae_train, quick, tmp_path):
    sae_train("--variant", "topk", "--grid", "lr=1e-3,1e-4", *quick, "--cache", big["path"], "--tokens", 1280)
    lines = [json.loads(line) for line in (tmp_path / "runs/run_1/metrics.jsonl").read_text().splitlines()]
    by_sae = {line["sae"]: line for line in lines}
    assert set(by_sae) == {"topk_lr0.001", "topk_lr0.0001"}
    result = json.loads((tmp_path / "runs/run_1/result.json").read_text())
    assert set(result["saes"]) == set(by_sae)


def test_a_fleet_reads_the_store_once(big, sae_train, quick, monkeypatch):
    """As many pieces are read for four SAEs as for one."""
    from saemill.cache_schema import Store

    reads = []
    read = Store.read

    def counting(self, request, span, out=None):
        reads.append(span)
        return read(self, request, span, out)

    monkeypatch.setattr(Store, "read", counting)
    common = [*quick, "--cache", big["path"], "--tokens", 1280]
    sae_train("--variant", "topk", *common)
    alone = len(reads)
    sae_train("--variant", "topk", "--grid", "k=1,2,3,4", *common)
    assert len(reads) - alone == alone > 2
