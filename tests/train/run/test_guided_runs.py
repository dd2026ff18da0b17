"""Guided SAEs from the command line: trained from the store, saved, loaded, resumed, refused."""

import json
import shutil

import pytest
import torch

from saemill.cache_schema import Store
from saemill.train import load_sae
from saemill.train.data.batch_stream import held_out
from saemill.train.data.scaling import unit_stats
from saemill.train.kit.variant_registry import config_type
from saemill.train.sae.side_inputs import Side

GUIDED = ["--variant", "hierarchical", "--set", "offsets=[0,1]", "--width", "32", "--tokens", "1280"]


def test_metrics_tell_how_layers_are_mixed_at_every_step(big, sae_train, quick, tmp_path):
    words = ["--set", "course.metrics_every_steps=2", "--set", "mixing_temperature_start=1.5"]
    sae_train(*GUIDED, *words, *quick, "--cache", big["path"])
    lines = [json.loads(line) for line in (tmp_path / "runs/run_1/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["mixing/weight_3"] + line["mixing/weight_4"] == pytest.approx(1.0)
    temperatures = [line["mixing/temperature"] for line in lines]
    assert temperatures == sorted(temperatures, reverse=True) and temperatures[0] == 1.5
    shares = [line["attention/contribution_3"] + line["attention/contribution_4"] for line in lines[1:]]
    assert shares == pytest.approx([1.0] * len(shares))
    extras = load_sae(tmp_path / "runs/run_1").extras_tensors
    assert extras["mixing.layers"].tolist() == [3, 4]
    assert extras["mixing.weight"].tolist() == pytest.approx(
        [lines[-1]["mixing/weight_3"], lines[-1]["mixing/weight_4"]]
    )


def test_a_guided_sae_is_saved_as_a_plain_one(big, sae_train, quick, tmp_path):
    sae_train(*GUIDED, "--set", "base=topk", "--k", "3", *quick, "--cache", big["path"])
    config = json.loads((tmp_path / "runs/run_1/hierarchical/cfg.json").read_text())
    assert config["architecture"] == "topk" and "needs_side" not in config


def test_an_encoder_that_reads_attention_gives_its_result_again_from_the_store(big, sae_train, quick, tmp_path):
    sae_train(*GUIDED, "--set", "guidance=encode", "--set", "rank=4", *quick, "--cache", big["path"])
    outcome = json.loads((tmp_path / "runs/run_1/result.json").read_text())["saes"]["hierarchical"]
    sae = load_sae(tmp_path / "runs/run_1")
    needs = config_type("hierarchical")(layer=3, offsets=(0, 1)).needs()
    active = tokens = 0
    with Store.open(big["path"]) as store, torch.no_grad():
        stats = {3: unit_stats(store.manifest.model.d_model)}
        for draw in held_out(store, [needs], stats, torch.device("cpu"), tokens=10**6, batch_tokens=64):
            batch = draw.batch(needs)
            active += int((sae.encode(batch.x, Side(batch.side)) > 0).sum())
            tokens += len(batch.x)
    assert active / tokens == pytest.approx(outcome["l0"], rel=1e-3)
    assert tokens == outcome["validation_tokens"]


@pytest.mark.parametrize("guidance", [["guidance=loss"], ["guidance=encode", "rank=4"]])
def test_going_on_changes_no_bit(big, sae_train, quick, tmp_path, same_bits, rewind, guidance):
    words = [*GUIDED, *(word for one in guidance for word in ("--set", one)), *quick, "--cache", big["path"]]
    words += ["--set", "course.checkpoint_every_steps=8"]
    sae_train(*words, "--name", "straight")
    stopped = shutil.copytree(tmp_path / "runs/straight", tmp_path / "runs/stopped")
    rewind(stopped)
    sae_train("--resume", "stopped", "--device", "cpu")
    same_bits(tmp_path / "runs/straight", stopped)


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "attention of layers 1, 2 (it has layers 3, 4)"),
        (["--set", "offsets=[]"], "offsets: expected distinct offsets"),
        (["--set", "alpha=-1"], "alpha: expected 0 or more, found -1"),
        (["--set", "offsets=[0]", "--set", "temperature=0"], "temperature: expected more than 0"),
        (["--set", "base=crosscoder"], "expected a variant that reads tokens of one layer"),
        (["--set", "base=topkk"], "did you mean 'topk'"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(big, sae_train, quick, tmp_path, words, said):
    result = sae_train("--variant", "hierarchical", *words, *quick, "--cache", big["path"], code=1)
    assert said in result.output
    assert not list(tmp_path.glob("runs/*"))


def test_one_window_in_a_batch_has_none_to_exchange_rows_with(big, sae_train, quick, tmp_path):
    """Said before the first step, of the smallest batch of the run."""
    words = [*GUIDED, "--set", "shuffle_attention=true", *quick, "--cache", big["path"]]
    result = sae_train(*words, "--set", "data.batch_tokens=10", code=1)
    assert "hierarchical: expected at least 2 whole windows per process in each batch, found 1" in result.output
    assert not list(tmp_path.glob("runs/*"))
    sae_train(*words)


def test_an_sae_on_whole_windows_says_how_many_tokens_it_was_trained_on(big, sae_train, tmp_path):
    """Batches of 11 tokens hold one window of 7, or none of the next."""
    words = ["--variant", "temporal", "--variant", "topk", "--layer", 3, "--device", "cpu", "--width", 32]
    words += ["--set", "data.batch_tokens=11", "--set", "data.pool_tokens=600", "--tokens", 1280]
    said = sae_train(*words, "--cache", big["path"]).output
    metadata = {
        name: json.loads((tmp_path / f"runs/run_1/{name}/cfg.json").read_text())["metadata"]["training_tokens"]
        for name in ("temporal", "topk")
    }
    share = int(said.split("SAEs on whole windows read ")[1].split("%")[0]) / 100
    assert metadata["topk"] == 1276 and metadata["temporal"] == pytest.approx(1276 * share, abs=7)
    sae_train("--variant", "temporal", *words[4:], "--cache", big["path"])  # where nobody reads single tokens
    run = tmp_path / "runs/run_2"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens"] == json.loads((run / "result.json").read_text())["tokens"] == metadata["temporal"]
