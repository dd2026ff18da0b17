"""What the command does, says and refuses."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import click
import numpy as np
import pytest
import torch

from saemill.cache_schema import Store
from saemill.train.cli import count, warnings_of
from saemill.train.data.prefetch import Loader
from saemill.train.engine.step import Trainee
from saemill.train.errors import NothingToTrain, resume_command
from saemill.train.run import after_run as onlooking
from saemill.train.run import run_folder, validate_and_save_results
from saemill.train.run.checkpoints_and_signals import catch_signals
from saemill.train.run.preflight import layer_stats
from saemill.train.run.run_folder import RunFolder, is_run
from saemill.train.run.validate_and_save_results import Outcome, SaeOutcome
from saemill.train.sae.kernels import dense_products

TOPK = ["--variant", "topk"]
CROSS = [*TOPK, "--variant", "crosscoder"]


def test_a_dry_run_says_what_the_run_would_be_and_writes_nothing(big, sae_train, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*TOPK, *quick, "--cache", big["path"], "--epochs", 2, "--width", 64, "--grid", "k=3,4"]
    monkeypatch.setattr("os.getloadavg", lambda: (999.0, 0.0, 0.0))
    said = sae_train(*words, "--dry-run").output
    assert "cpu; this machine was busy in the last minute (load 999.0 on" in " ".join(said.split())
    for fact in ("topk_k3", "width 64, k 4, ", "of 64 tokens", "from a few steps on cpu", big["path"]):
        assert fact in " ".join(said.split())
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    (found,) = json.loads(sae_train(*words, "--dry-run", "--json").stdout)["runs"]
    assert list(tmp_path.iterdir()) == [] and not found["busy"]
    trained = sae_train(*words).output
    for label, rate in found["learning_rates"].items():
        of_sae = f"{label}: layer 3, width 64, k {label[-1]}, seed 0, lr {rate:.3g}"
        assert of_sae in said and of_sae in trained
    run = tmp_path / "runs/run_1"
    config, outcome = (json.loads((run / name).read_text()) for name in ("config.json", "result.json"))
    assert found["config"] | {"provenance": 0} == config | {"provenance": 0}
    assert (found["steps"], found["tokens"]) == (outcome["steps"], outcome["tokens"])
    states = sum(sae["state_bytes"] for sae in outcome["saes"].values())  # weights and two moments, and small things
    assert 3 / 4 * found["memory_bytes"] < states < found["memory_bytes"]
    disk = sum(file.stat().st_size for file in run.rglob("*.safetensors"))
    assert disk < found["disk_bytes"] < 4 * disk and found["seconds"] > 0


def test_a_setting_that_some_saes_do_not_read_is_told_by_run_and_dry_run(big, sae_train, quick):
    words = [*TOPK, "--variant", "jumprelu", *quick, "--cache", big["path"], "--tokens", 64, "--width", 64, "--k", 2]
    said = "k is not read by jumprelu"
    assert said in sae_train(*words, "--dry-run").output and said in sae_train(*words).output.splitlines()
    assert json.loads(sae_train(*words, "--dry-run", "--json").stdout)["runs"][0]["unread"] == [said]


@pytest.mark.parametrize("has_fast", [True, False])
def test_a_product_that_the_machine_does_not_have_is_told(big, sae_train, quick, tmp_path, monkeypatch, has_fast):
    """config.json says what was asked for; other latents are chosen where it is not had."""
    monkeypatch.setattr(dense_products, "has_fast_bfloat16", lambda _: has_fast)
    words = [*TOPK, *quick, "--cache", big["path"], "--tokens", 640, "--width", 64, "--set", "encoder_product=bfloat16"]
    said = "topk: encoder_product=bfloat16 is computed in float32: this machine has no fast bfloat16 products"
    assert (said in sae_train(*words).output) == (not has_fast)
    found = json.loads((tmp_path / "runs/run_1/result.json").read_text())["saes"]["topk"]
    assert found["encoder_product"] == ("bfloat16" if has_fast else "float32")


def test_a_dry_run_refuses_what_a_run_refuses(big, sae_train, quick, tmp_path):
    words = [*quick, "--cache", big["path"], "--dry-run"]
    assert "found 100" in sae_train(*TOPK, *words, "--k", 100, "--width", 64, code=1).stderr
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/notes").touch()
    assert "already exists" in sae_train(*TOPK, *words, "--name", "mine", code=1).stderr
    shutil.rmtree(tmp_path / "runs")
    assert "leave out either it or --resume" in sae_train(*words, "--resume", "run_1", code=1).stderr
    assert "--tokens" in sae_train(*TOPK, *words, "--tokens", 10, code=1).stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_leaves_what_it_promises(big, sae_train, quick, tmp_path):
    result = sae_train(*TOPK, *quick, "--cache", big["path"], "--epochs", 2, "--k", 3, "--width", 64, "--plots")
    run = tmp_path / "runs/run_1"
    config, outcome = (json.loads((run / name).read_text()) for name in ("config.json", "result.json"))
    with Store.open(big["path"]) as store:
        assert config["cache"]["cache_id"] == store.manifest.cache_id
    assert config["saes"]["topk"]["config"]["k"] == 3 and config["saes"]["topk"]["config"]["width"] == 64
    assert {"date", "command", "git", "python", "packages", "hardware", "run_id"} == set(config["provenance"])
    assert config["provenance"]["hardware"].keys() == {"device", "threads", "processes"}
    assert config["provenance"]["packages"]["torch"]
    assert (run / "topk/cfg.json").is_file() and (run / "topk/sae_weights.safetensors").is_file()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["tokens"] == outcome["tokens"] == outcome["steps"] * 64
    assert outcome["saes"]["topk"]["l0"] == pytest.approx(3, abs=0.1)
    assert outcome["saes"]["topk"]["step_seconds"] > 0
    with Store.open(big["path"]) as store:
        tables = 2 * 64 * store.manifest.model.d_model * 4
    assert 3 * tables < outcome["saes"]["topk"]["state_bytes"] < 4 * tables  # and two moments of each
    assert 0 < outcome["saes"]["topk"]["explained_variance"] < 1
    for said in (
        "steps",
        "tokens/s",
        "L0",
        ", k 3, seed 0, lr 0.0",
        "L0 and EV (explained variance) are measured on ",
        f" {outcome['saes']['topk']['validation_tokens']:,} tokens of the store's validation split",
        "progress lines show a batch's",
        "dead",
        "waiting for data",
        "share a document",
        "run_1/topk",
    ):
        assert said in result.output
    assert result.output.rstrip().endswith(f"next: sae-eval {run}")
    assert "ended" in (run / "live.js").read_text()  # a page while it trained, and in the end the whole one
    assert "held-out" in (run / "report.html").read_text()


def test_a_run_without_plots_has_no_page(big, sae_train, quick, tmp_path):
    sae_train(*TOPK, *quick, "--cache", big["path"], "--tokens", 64, "--no-plots")
    left = {path.name for path in (tmp_path / "runs/run_1").iterdir() if not path.name.startswith(".")}
    assert left == {"checkpoints", "config.json", "metrics.jsonl", "result.json", "topk"}


def test_the_commit_of_a_project_in_which_the_code_is_installed_is_not_the_code_s(tmp_path):
    for name in ("its_own.py", "installed.py"):
        (tmp_path / name).touch()
    as_somebody = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init"], ["add", "its_own.py"], [*as_somebody, "commit", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    found = run_folder._git_state(tmp_path / "its_own.py")
    assert found is not None and len(found["commit"]) == 40 and found["is_dirty"]
    assert run_folder._git_state(tmp_path / "installed.py") is None


def test_the_command_that_a_run_keeps_names_no_password(monkeypatch):
    """Folders of runs are shared."""
    words = ["sae-train", "--cache", "https://me:secret@host/store", "--set", "course.trackers=a@b"]
    monkeypatch.setattr(sys, "argv", words)
    kept = "sae-train --cache https://host/store --set course.trackers=a@b"
    assert run_folder.provenance({})["command"] == kept


def test_who_looks_on_costs_a_run_a_hundredth_of_its_time(monkeypatch, tmp_path):
    clock, looks, said = [0.0], [], []

    def look(folder, say, pause):
        looks.append((clock[0], pause))
        say("no room left")
        clock[0] += 9.0 if len(looks) == 1 else 0.2  # the first time is spent importing

    monkeypatch.setattr(onlooking, "after_run", look)
    monkeypatch.setattr(onlooking, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    onlookers = onlooking.Onlookers(tmp_path, said.append)
    while clock[0] < 60:
        onlookers.look()
        clock[0] += 0.5
    assert looks[:2] == [(0.0, 5.0), (14.0, 5.0)]
    assert looks[2][0] == pytest.approx(14.2 + 20, abs=0.5) and looks[2][1] == pytest.approx(20)
    assert said == ["no room left"]


def test_an_sae_that_is_no_better_than_the_mean_is_pointed_out():
    poor = SaeOutcome("runs/run_1/poor", "topk", 8, 1.0, -0.2, 0, 0.0, None, 10)
    saes = {"poor": poor, "fair": replace(poor, explained_variance=0.5)}
    outcome = Outcome("runs/run_1", 1, 1, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, saes)
    (line,) = warnings_of(outcome)
    assert line.startswith("warning: poor: activations of the validation split are reconstructed no better than by")
    assert warnings_of(replace(outcome, saes={"fair": saes["fair"]})) == []


def test_held_out_rows_that_are_all_alike_have_no_variance_to_explain(write_store, sae_train, quick, tmp_path):
    """The run ends all the same, and says so."""
    store = write_store(tmp_path / "store", windows=60, layers=(3,), splits=(40, 50), alike=(40, 50))
    said = sae_train(*TOPK, *quick, "--cache", store["path"], "--tokens", 256, "--k", 3, "--width", 16).output
    assert "warning: topk: rows of the validation split are all alike" in said and "no better than" not in said
    sae = json.loads((tmp_path / "runs/run_1/result.json").read_text())["saes"]["topk"]
    assert sae["explained_variance"] is None and sae["validation_tokens"] == 70
    cfg = json.loads((tmp_path / "runs/run_1/topk/cfg.json").read_text(), parse_constant=pytest.fail)
    assert cfg["metadata"]["explained_variance"] is None


def test_a_run_whose_last_steps_diverged_is_named_and_leaves_no_sae(big, sae_train, quick, tmp_path):
    words = [*TOPK, *quick, "--cache", big["path"], "--tokens", 64, "--k", 3, "--width", 16, "--lr", 1e39]
    for again in (words, ["--resume", "run_1", "--device", "cpu"]):
        said = sae_train(*again, code=1).output
        assert "error: topk: its reconstruction of held-out text is not finite: training diverged" in said
        assert not (tmp_path / "runs/run_1/result.json").exists() and not (tmp_path / "runs/run_1/topk").exists()


def test_a_run_whose_configuration_may_not_be_read_is_one(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    assert not is_run(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(run_folder, "read_json", refuse)
    assert is_run(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_ignored(number):
    """As Ctrl-C is by what a shell starts in the background, and SIGHUP by what nohup starts."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with catch_signals() as caught:
            assert signal.getsignal(number) == signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
        assert caught.signal == signal.SIGTERM
    finally:
        signal.signal(number, before)


def test_a_second_sighup_changes_nothing():
    """When a terminal is closed, the system, the shell and a launcher may each send one: it would end the save."""
    before = signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        with catch_signals() as caught:
            for _ in range(2):
                signal.raise_signal(signal.SIGHUP)
        assert caught.signal == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_sigterm_of_a_launch_changes_nothing():
    """A cluster sends one to every process, and the launcher another: the second would end what is being saved."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background ignores
    try:
        with catch_signals(is_launched=True) as caught:
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
            assert caught.signal == signal.SIGTERM
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_runs_get_the_next_free_number(big, sae_train, quick, tmp_path):
    (tmp_path / "runs/run_2").mkdir(parents=True)
    for _ in range(2):
        sae_train(*TOPK, *quick, "--cache", big["path"], "--tokens", 64)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"run_1", "run_2", "run_3"}
    assert "which has run_1, run_3: give one of these" in sae_train("--resume", "run_4", code=1).output


def test_what_a_run_holds_of_the_store_is_gone_when_held_out_text_is_read(big, sae_train, quick, monkeypatch):
    """Both together may be more than there is."""
    blocks, block, validate = [], Loader.block, validate_and_save_results.validate

    def remembered(loader, plan):
        found = block(loader, plan)
        blocks.append(weakref.ref(found))
        return found

    def measured(*given):
        gc.collect()
        assert blocks and not any(one() is not None for one in blocks)
        return validate(*given)

    monkeypatch.setattr(Loader, "block", remembered)
    monkeypatch.setattr(validate_and_save_results, "validate", measured)
    sae_train(*TOPK, *quick, "--cache", big["path"], "--tokens", 640)


def test_a_run_beside_the_folder_of_runs_is_told_by_its_whole_path(big, sae_train, quick, tmp_path, monkeypatch):
    """Commands look under `runs` first, where another has its name."""
    monkeypatch.chdir(tmp_path)
    words = [*TOPK, *quick, "--cache", big["path"], "--tokens", 640]
    sae_train(*words, out="runs")
    assert sae_train(*words, out=".").output.rstrip().endswith(f"next: sae-eval {tmp_path / 'run_1'}")
    assert str(RunFolder("run_1").path) == str(tmp_path / "run_1") and str(RunFolder("runs/run_1").path) == "runs/run_1"


def test_a_name_that_is_taken_is_refused(big, sae_train, quick, tmp_path):
    (tmp_path / "runs/mine").mkdir(parents=True)
    words = [*TOPK, *quick, "--cache", big["path"], "--tokens", 640, "--name", "mine"]
    (tmp_path / "runs/mine/notes.txt").write_text("of somebody")
    assert "already exists: choose another --name\n" in sae_train(*words, code=1).output
    (tmp_path / "runs/mine/notes.txt").unlink()
    assert "already exists" in sae_train(*words, code=1).output  # it may be another start's, of this moment
    os.utime(tmp_path / "runs/mine", (0, 0))
    sae_train(*words)  # an empty folder is what a full disk leaves, and nothing could go on from it
    evaluate = f"choose another --name, or evaluate it: sae-eval {tmp_path}/runs/mine\n"
    assert evaluate in sae_train(*words, code=1).output
    assert "at most 255 bytes" in sae_train(*words, "--name", "n" * 256, code=1).output


def test_what_is_to_be_pasted_keeps_a_path_with_spaces_whole(big, sae_train, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*TOPK, *quick, "--cache", big["path"], "--tokens", 640, "--name", "my run"]
    assert "next: sae-eval 'my run'" in sae_train(*words, out="runs").output
    assert f"or evaluate it: sae-eval '{tmp_path}/runs/my run'" in sae_train(*words, code=1).output
    assert f"with: sae-eval '{tmp_path}/runs/my run'" in sae_train("--resume", "my run", code=1).output
    assert resume_command(tmp_path / "my run") == f"sae-train --resume '{tmp_path}/my run'"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--variant", "topkk"], "did you mean 'topk'"),
        ([], "expected --variant NAME"),
        ([*TOPK, "--set", "kk=3"], "did you mean 'k'"),
        ([*TOPK, "--set", "topk.kk=3"], "unknown setting 'topk.kk' of topk (did you mean 'k'"),
        ([*TOPK, "--set", "lrr=3"], "unknown setting 'lrr' of topk (did you mean 'optim.lr'?)"),
        ([*TOPK, "--set", "course.epoch=3"], "did you mean 'epochs'"),
        ([*TOPK, "--set", "optim.learning_rate=1e-3"], "'optim.learning_rate' of topk (here it is optim.lr)"),
        ([*TOPK, "--set", "train_batch_size_tokens=64"], "(here it is data.batch_tokens)"),
        ([*TOPK, "--set", "l1_penalty=5"], "(known: aux_k"),
        ([*TOPK, "--set", "optim.beta=0"], "did you mean 'optim.beta"),
        ([*TOPK, "--set", "k"], "expected a setting like"),
        ([*TOPK, "--set", "k=three"], "topk.k: expected a whole number, found 'three'"),
        ([*TOPK, "--k", "99", "--width", "32"], "topk: k: expected more than 0 and at most width = 32, found 99"),
        ([*TOPK, "--grid", "data.batch_tokens=1,2"], "--grid is for SAEs that share data"),
        ([*TOPK, "--grid", "seed=0,1", "--grid", "seed=2,3"], "expected seed once in a grid"),
        ([*TOPK, "--grid", "lr=1e-3,1e-4", "--grid", "optim.lr=1,2"], "expected optim.lr once in a grid"),
        ([*TOPK, "--grid", "layer=3,4"], "expected layer only in --grid, found layer=3 in an option"),
        (
            [*TOPK, "--grid", "lr=1,2", "--set", "optim.lr=3"],
            "expected optim.lr only in --grid, found optim.lr=3 in an option",
        ),
        ([*TOPK, "--tokens", "10"], "less than one batch of 64"),
        ([*TOPK, "--tokens", "1M"], "give --epochs 157 to read it again"),
        ([*TOPK, "--tokens", "1M", "--epochs", "2"], "in an epoch, 12,880 in 2"),
        ([*TOPK, "--layer", "11"], "residuals of layer 11 (it has layers 3, 4)"),
        ([*TOPK, "--width", "1B"], "GiB of memory on cpu"),
        ([*TOPK, "--device", "nonsense"], "expected a device like auto"),
        ([*TOPK, "--device", "vulkan"], "found 'vulkan': it is not supported"),
        ([*TOPK, "--tokens", "0"], "tokens: expected 1 or more, found 0"),
        ([*TOPK, "--set", "course.epochs=-3"], "epochs: expected 1 or more, found -3"),
        ([*TOPK, "--set", "course.checkpoint_every_seconds=NaN"], "expected a number, found 'NaN'"),
        ([*TOPK, "--set", "course.metrics_every_steps=0"], "metrics_every_steps: expected 1 or more, found 0"),
        ([*TOPK, "--set", "course.checkpoint_every_steps=0"], "checkpoint_every_steps: expected 1 or more, found 0"),
        ([*TOPK, "--set", "data.batch_tokens=0"], "batch_tokens: expected 1 or more, found 0"),
        ([*TOPK, "--set", "data.seed=-1"], "seed: expected 0 or more, found -1"),
        ([*TOPK, "--set", "aux_k=-1"], "aux_k: expected 1 or more (aux_weight=0 turns the loss off), found -1"),
        ([*TOPK, "--set", "aux_k=0"], "aux_k: expected 1 or more (aux_weight=0 turns the loss off), found 0"),
        ([*TOPK, "--set", "dead_after_tokens=0"], "dead_after_tokens: expected 1 or more, found 0"),
        (
            [*CROSS, "--set", "layers=3,4", "--set", "crosscoder.gate=relu", "--set", "crosscoder.k=4"],
            "k 4 would be ignored: only gate=batchtopk reads it",
        ),
        (
            [*CROSS, "--set", "layers=3,4", "--set", "crosscoder.penalty=1"],
            "penalty 1 would be ignored: only gate=relu reads it",
        ),
        (["--variant", "tiered", "--set", "resample_until=0.5"], "only resample_every_steps reads it; set that too"),
        (["--variant", "jumprelu", "--set", "initial_threshold=0.1"], "only optim.start=drawn reads it"),
        ([*TOPK, "--set", "optim.clip_norm=0"], "optim.clip_norm: expected a positive number, found 0"),
        (["--variant", "tiered", "--set", "tier_clip_norm=-5"], "tier_clip_norm: expected more than 0, found -5"),
        (["--variant", "standard", "--width", "0"], "width: expected 1 or more, found 0"),
        (["--variant", "gated", "--set", "width=-4"], "width: expected 1 or more, found -4"),
        ([*TOPK, "--set", "data.pool_tokens=10"], "pool_tokens 10 for batch_tokens 64"),
        ([*TOPK, "--set", 'course.trackers=["nosuch"]', "--tokens", "640"], "expected trackers among"),
        (["--resume", "nothing"], "which has no runs: train one without --resume, or set --out to"),
    ],
)
def test_mistakes_are_named(big, sae_train, quick, tmp_path, words, said):
    options = [] if "--resume" in words else ["--cache", big["path"], *quick]
    result = sae_train(*options, *words, code=1)
    assert said in result.output
    assert not list((tmp_path / "runs").glob("*"))


def test_the_stores_only_layer_is_taken(write_store, sae_train, quick, tmp_path):
    """Whoever harvested layer 5 need not say so again; whoever asks for another is refused."""
    store = write_store(tmp_path / "store", layers=(5,), windows=400, splits=(360, 380))
    words = [*TOPK, "--cache", store["path"], "--tokens", 640, *quick[2:]]
    assert "topk: layer 5, " in sae_train(*words).output
    assert "residuals of layer 19 (it has layer 5)" in sae_train(*words, "--layer", 19, code=1).output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (TOPK, "holds layers 3, 4 and not the default: choose with --layer 3 or --layer 4\n"),
        ([*TOPK, "--set", "topk.layer=3"], None),
        (["--variant", "transcoder"], "with --layer 3 or --layer 4, and with --set to_layer=3 or --set to_layer=4\n"),
        (["--variant", "transcoder", "--layer", "3"], "choose with --set to_layer=3 or --set to_layer=4\n"),
        (["--variant", "transcoder", "--layer", "3", "--set", "to_layer=null"], "choose with --set to_layer=3 or"),
        (["--variant", "crosscoder"], "choose with --set layers=3,4\n"),
    ],
)
def test_where_the_store_holds_several_layers_the_choices_are_named(big, sae_train, quick, words, said):
    options = ["--cache", big["path"], "--tokens", 640, *quick[2:]]
    result = sae_train(*words, *options, code=0 if said is None else 1)
    assert said is None or said in result.output


@pytest.mark.parametrize("tokens", ["NaN", "Infinity", "1e999", "2.5", "-5", "many"])
def test_a_number_of_tokens_is_a_whole_one(sae_train, tokens):
    assert "expected a number like 50M" in sae_train(*TOPK, "--tokens", tokens, code=2).output


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--k", "16,32"),
        ("--k", "16,128"),
        ("--width", "1024,2048"),
        ("--tokens", "16,32"),
        ("--tokens", "1,5M"),
        ("--tokens", "1024,2048"),
    ],
)
def test_what_may_be_a_list_is_no_number(sae_train, option, text):
    output = sae_train(*TOPK, option, text, code=2).output
    assert f"found '{text}'" in output
    assert (f"for a fleet, give --grid {option[2:]}={text}" in output) == (option != "--tokens")


@pytest.mark.parametrize(("text", "tokens"), [("10,000", 10_000), ("1,000,000", 10**6), ("4.1m", 4_100_000)])
def test_a_comma_sets_thousands_of_tokens_apart(text, tokens):
    assert count(None, click.Option(["--tokens"]), text) == tokens


def test_a_store_that_is_not_there(sae_train, tmp_path):
    assert "no store" in sae_train(*TOPK, "--cache", tmp_path / "none", code=1).output
    assert "expected --cache" in sae_train(*TOPK, code=1).output


def test_everything_a_store_lacks_comes_in_one_message(big, sae_train):
    words = ["--variant", "topk", "--grid", "layer=7,3,9", "--cache", big["path"], "--set", "data.batch_tokens=64"]
    result = sae_train(*words, code=1)
    assert "residuals of layers 7, 9" in result.output


def test_an_empty_split_is_an_error(write_store, sae_train, quick, tmp_path):
    write_store(tmp_path / "store", windows=60, splits=(0, 30))
    result = sae_train(*TOPK, *quick, "--cache", tmp_path / "store", code=1)
    assert "has 0 windows" in result.output
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--variant", "topk", "--cache", "{store}"], "validation split"),
        (["--variant", "tired", "--cache", "nowhere"], "did you mean 'tiered'"),
        (["--variant", "attention", "--cache", "{store}", "--set", "head=7"], "head: expected a head"),
    ],
)
def test_what_no_run_could_end_with_is_told_before_its_folder_is_made(
    write_store, sae_train, quick, tmp_path, words, said
):
    write_store(tmp_path / "store", windows=60, splits=(60, 60))
    words = [word.format(store=tmp_path / "store") for word in words]
    if words[1] != "tired":
        words += quick
    assert said in sae_train(*words, code=1).output
    assert not list(tmp_path.glob("runs/*"))


def test_a_step_without_memory_says_what_was_asked_and_what_to_turn(big, sae_train, quick, tmp_path, monkeypatch):
    def step(self, batch):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which "
            "1.06 GiB is free. Including non-PyTorch memory, this process has 78.12 GiB memory in use."
        )

    monkeypatch.setattr(Trainee, "step", step)
    output = sae_train(*TOPK, *quick, "--cache", big["path"], "--tokens", 640, code=1).output
    for said in ("topk: cpu has no memory left", "Tried to allocate 2.00 GiB", "1.06 GiB is free", "smaller --width"):
        assert said in output
    assert "No checkpoint had been written" in output and "Traceback" not in output
    assert not list((tmp_path / "runs").iterdir()), "a run that took no step is left behind"


def test_a_later_step_without_memory_leaves_the_log_and_the_run_can_begin_again(
    big, sae_train, quick, tmp_path, monkeypatch
):
    words, step = [*TOPK, *quick, "--cache", big["path"], "--tokens", 640, "--name", "mine"], Trainee.step

    def third(self, batch):
        if self.step_index == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full.")
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainee, "step", third)
        said = "".join(sae_train(*words, code=1).output.split())
    run = tmp_path / "runs/mine"
    assert (
        f"Nocheckpointhadbeenwritten:thelogisin{run}.Startagainfromstep0withthesamesettings:sae-train--resume" in said
    )
    assert (run / "metrics.jsonl").stat().st_size > 0 and not (run / "checkpoints").exists()
    assert f"resume it: {resume_command(run)}\n" in sae_train(*words, code=1).output
    assert "no checkpoint found: starting at step 0" in sae_train("--resume", "mine", "--device", "cpu").output
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[0] == 0 and steps == sorted({*steps}) and (run / "result.json").exists()


def test_a_device_without_room_for_the_run_is_told_before_there_is_one(big, sae_train, quick, tmp_path, monkeypatch):
    def allocate(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full. Yes. No.")

    for where in ("saemill.train.data.batch_stream.Loader", "saemill.train.run.start_or_resume.Fleet"):
        with monkeypatch.context() as patch:
            patch.setattr(where, allocate)
            output = sae_train(*TOPK, *quick, "--cache", big["path"], "--tokens", 640, code=1).output
        assert "cpu has no memory left (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full)" in output
        assert not list(tmp_path.glob("runs/*"))


def test_a_run_whose_store_has_moved_asks_for_it(big, sae_train, quick, tmp_path):
    shutil.copytree(big["path"], tmp_path / "store")
    sae_train(*TOPK, *quick, "--cache", tmp_path / "store", "--tokens", 640)
    (tmp_path / "runs/run_1/result.json").unlink()
    shutil.move(tmp_path / "store", tmp_path / "moved")
    said = sae_train("--resume", "run_1", "--device", "cpu", code=1).output
    assert f"was trained on the store {tmp_path / 'store'}, which is no longer there: give its location" in said
    sae_train("--resume", "run_1", "--device", "cpu", "--cache", tmp_path / "moved")


def test_a_place_where_no_run_can_be_kept(big, sae_train, quick, tmp_path):
    (tmp_path / "file").touch()
    result = sae_train(*TOPK, *quick, "--cache", big["path"], "--epochs", 2, out=tmp_path / "file", code=1)
    assert "choose another --out" in result.output


def test_a_loss_that_leaves_the_numbers_names_its_place(big, sae_train, quick, tmp_path):
    """Diverged, because the learning rate is absurd: step, shards and windows, and no result."""
    words = [*TOPK, *quick, "--cache", big["path"], "--epochs", 2, "--lr", "1e30", "--set", "optim.warmup_steps=0"]
    result = sae_train(*words, code=1)
    assert "step 1" in result.output or "step 2" in result.output
    for said in ("shard", "windows", "their activations are finite", "Lower the learning rate"):
        assert said in result.output
    assert not list(tmp_path.glob("runs/run_1/result.json"))
    assert not list(tmp_path.glob("runs/run_1/topk"))


def test_activations_that_are_no_numbers_name_their_place(write_store, sae_train, quick, tmp_path):
    """Window 70 is broken; its moments were taken before."""
    write_store(tmp_path / "store", windows=300, break_at=(3, 70))
    result = sae_train(*TOPK, *quick, "--cache", tmp_path / "store", "--epochs", 1, code=1)
    assert "not finite numbers: shard 2, windows 70." in result.output
    assert not list(tmp_path.glob("runs/*/result.json"))


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(0.0, "that are not zero, found none among 2,100"), (1.0, "that differ, found 2,100 rows that are all alike")],
)
def test_a_layer_of_one_row_again_and_again_is_refused(write_store, sae_train, quick, tmp_path, scale, expected):
    store = write_store(tmp_path / "store", alike=(0, 300), scale=scale)
    said = sae_train(*TOPK, *quick, "--cache", store["path"], code=1).output
    assert "layer 3 of" in said and expected in said
    assert not list(tmp_path.glob("runs/*"))


def test_rows_that_are_all_alike_are_given_to_whoever_asks_for_them_and_zeros_are_not(write_store, tmp_path):
    """Scaled they are numbers, which zeros would not be."""
    with Store.open(write_store(tmp_path / "alike", alike=(0, 300))["path"]) as opened:
        assert layer_stats(opened, 3, None).scale.isfinite().all()
    zeros = write_store(tmp_path / "zeros", alike=(0, 300), scale=0.0)["path"]
    with Store.open(zeros) as opened, pytest.raises(NothingToTrain, match="layer 3 of .* found none among"):
        layer_stats(opened, 3, None)


def test_statistics_that_are_no_numbers_name_their_shard(write_store, sae_train, quick, tmp_path):
    write_store(tmp_path / "store", windows=300, break_at=(3, 70), measured=True)
    result = sae_train(*TOPK, *quick, "--cache", tmp_path / "store", "--epochs", 1, code=1)
    assert "activations of layer 3 are not all finite numbers, in shard 2." in result.output
    assert not list(tmp_path.glob("runs/*"))


def test_a_damaged_shard_is_named_with_its_remedy(big, sae_train, quick, tmp_path):
    shutil.copytree(big["path"], tmp_path / "store")
    chunk = next((tmp_path / "store/resid/layer_3").glob("c.5.*"))
    data = np.fromfile(chunk, np.uint8)
    data[33] ^= 4
    data.tofile(chunk)
    result = sae_train(*TOPK, *quick, "--cache", tmp_path / "store", "--epochs", 1, code=1)
    assert "shard 5, array resid/layer_3" in result.output and "sae-store repair" in result.output


def test_the_options_are_few(big):
    """Growing the command needs a visible change here: everything else is --set."""
    from saemill.train.cli import main

    expected = "variant recipe cache out name tokens epochs layer width k lr seed device spread set grid init"
    expected += " with_baselines resume plots is_dry_run is_json"
    assert [parameter.name for parameter in main.params] == expected.split()


def test_a_store_in_an_object_store_trains_the_same(big, sae_train, quick, tmp_path, same_bits):
    """From memory:// as from a disk."""
    import fsspec

    remote = fsspec.filesystem("memory")
    remote.put(big["path"], "/stores/big", recursive=True)
    for name, cache in (("near", big["path"]), ("far", "memory://stores/big")):
        sae_train(*TOPK, *quick, "--cache", cache, "--tokens", 1280, "--name", name)
    same_bits(tmp_path / "runs/near", tmp_path / "runs/far")


@pytest.mark.parametrize(
    ("word", "here"),
    [("--d_sae", "--width"), ("--learning-rate", "--lr"), ("--l1_coefficient", "--set penalty=VALUE"), ("--nam", None)],
)
def test_an_option_of_another_library_is_answered_with_the_one_here(sae_train, word, here):
    said = sae_train(*TOPK, word, 5, code=2).output
    assert f"No such option '{word}'" in said and (f"(here it is {here})" in said if here else "'--name'" in said)
