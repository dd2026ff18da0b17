"""Massive rows train nothing, are in no scale and no number, and every result says how many there were."""

import json
import shutil

import numpy as np
import pytest
import torch

from saemill.cache_schema import Store, massive_activations
from saemill.train.data.batch import Kind, Needs
from saemill.train.data.batch_stream import Feed
from saemill.train.data.shuffle_order import Plan, measure_split
from saemill.train.run import preflight
from saemill.train.run.preflight import layer_stats

TRAIN = [(3, 11, 2), (3, 400, 7), (4, 400, 7), (4, 801, 1)]
HELD_OUT = [(3, 930, 3), (3, 941, 4)]
ALL_OF_40 = {(3, window, at) for window in range(60, 100) for at in range(8)}
TOPK = ["--variant", "topk", "--k", "3", "--width", "64", "--epochs", "2"]


@pytest.fixture(scope="module")
def spiked(write_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spiked") / "store"
    return write_store(folder, windows=1000, shard_windows=64, splits=(920, 960), massive=TRAIN + HELD_OUT)


def result_of(folder, run="run_1"):
    return json.loads((folder / "runs" / run / "result.json").read_text())


def test_a_run_tells_what_it_left_out_and_both_numbers(spiked, sae_train, quick, tmp_path):
    said = sae_train(*TOPK, *quick, "--cache", spiked["path"]).output
    assert "layer 3: 4 of 7,000 tokens (0.057%) have a norm beyond 10 times the median" in said
    assert "with massive rows" in said
    result = result_of(tmp_path)
    assert result["massive"]["3"]["massive"] == 4 and result["massive"]["3"]["tokens"] == 7000
    bound = result["massive"]["3"]["norm_bound"]
    saved = json.loads((tmp_path / "runs/run_1/topk/cfg.json").read_text())
    assert bound == 10 * result["massive"]["3"]["median_norm"] and saved["metadata"]["norm_bounds"] == {"3": bound}
    sae = result["saes"]["topk"]
    assert (sae["validation_tokens"], sae["validation_massive"]) == (40 * 7 - 2, 2)
    assert sae["explained_variance"] > 0.3 and sae["explained_variance_with_massive"] < 0.9 * sae["explained_variance"]
    config = json.loads((tmp_path / "runs/run_1/config.json").read_text())
    assert config["data"]["massive_norms"] == 10.0


def test_massive_rows_change_nothing_of_what_is_learned(spiked, write_store, sae_train, quick, tmp_path):
    """The mean norm of what trains is sqrt(D) with them and without: the scale is not theirs. Other batches alone, as
    four rows are missing, move explained variance by 0.03."""
    clean = write_store(tmp_path / "clean", windows=1000, shard_windows=64, splits=(920, 960))
    for name, url in (("spiked", spiked["path"]), ("clean", clean["path"])):
        sae_train(*TOPK, *quick, "--cache", url, "--name", name)
    found, expected = (result_of(tmp_path, name)["saes"]["topk"] for name in ("spiked", "clean"))
    assert found["explained_variance"] == pytest.approx(expected["explained_variance"], abs=0.05)
    assert expected["validation_massive"] == 0 and expected["explained_variance_with_massive"] is None


def test_a_run_of_before_the_setting_is_one_without_and_resumes_to_the_same_bits(
    spiked, sae_train, quick, tmp_path, same_bits, rewind
):
    words = [*TOPK, *quick, "--cache", spiked["path"], "--set", "data.massive_norms=inf"]
    words += ["--tokens", 3200, "--set", "course.checkpoint_every_steps=20"]
    said = sae_train(*words, "--name", "whole").output
    assert "massive" not in said and result_of(tmp_path, "whole")["massive"] == {}
    run = shutil.copytree(tmp_path / "runs/whole", tmp_path / "runs/before")
    rewind(run)
    config = json.loads((run / "config.json").read_text())
    del config["data"]["massive_norms"]
    (run / "config.json").write_text(json.dumps(config))
    sae_train("--resume", "before", "--device", "cpu")
    same_bits(run, tmp_path / "runs/whole")


def test_a_run_of_before_its_input_was_centred_by_the_mean_goes_on_as_it_began(
    spiked, sae_train, quick, tmp_path, same_bits, rewind
):
    words = [*TOPK, *quick, "--cache", spiked["path"], "--set", "centre_by_mean=false"]
    sae_train(*words, "--tokens", 3200, "--set", "course.checkpoint_every_steps=20", "--name", "whole")
    run = shutil.copytree(tmp_path / "runs/whole", tmp_path / "runs/before")
    rewind(run)
    config = json.loads((run / "config.json").read_text())
    del config["saes"]["topk"]["config"]["centre_by_mean"]
    (run / "config.json").write_text(json.dumps(config))
    sae_train("--resume", "before", "--device", "cpu")
    same_bits(run, tmp_path / "runs/whole")


def test_a_run_of_before_parts_of_shards_were_sampled_goes_on_with_its_sample(
    spiked, sae_train, quick, tmp_path, same_bits, rewind, monkeypatch
):
    monkeypatch.setattr(massive_activations, "SAMPLE_BYTES", 2 * 64 * 8 * 16 * 2)
    monkeypatch.setattr(massive_activations, "PARTS", 128)
    words = [*TOPK, *quick, "--cache", spiked["path"], "--tokens", 3200, "--set", "course.checkpoint_every_steps=20"]
    with monkeypatch.context() as before:
        before.setattr(preflight, "sample", massive_activations.sample_whole)
        sae_train(*words, "--name", "whole")
    run = shutil.copytree(tmp_path / "runs/whole", tmp_path / "runs/before")
    rewind(run)
    config = json.loads((run / "config.json").read_text())
    assert config.pop("massive_sample") == "parts"
    (run / "config.json").write_text(json.dumps(config))
    sae_train("--resume", "before", "--device", "cpu")
    same_bits(run, tmp_path / "runs/whole")
    sae_train(*words, "--name", "now")
    assert result_of(tmp_path, "now")["massive"] != result_of(tmp_path, "before")["massive"]


def test_a_run_with_the_rule_resumes_to_the_same_bits(spiked, sae_train, quick, tmp_path, same_bits, rewind):
    words = [*TOPK, *quick, "--cache", spiked["path"], "--tokens", 3200, "--set", "course.checkpoint_every_steps=20"]
    sae_train(*words, "--name", "whole")
    run = shutil.copytree(tmp_path / "runs/whole", tmp_path / "runs/resumed")
    rewind(run)
    sae_train("--resume", "resumed", "--device", "cpu")
    same_bits(run, tmp_path / "runs/whole")


def make_feed(store, needs, device="cpu", **share):
    plan = Plan(measure_split(store, "train"), batch_tokens=64, pool_tokens=640, seed=0)
    stats = {layer: layer_stats(store, layer, 10.0) for layer in (3, 4)}
    return Feed(store, plan, needs, stats, torch.device(device), **share)


@pytest.mark.parametrize("windows", [False, True])
def test_every_row_is_drawn_once_but_the_massive_ones_of_the_layers_that_are_read(spiked, windows):
    """Of an SAE of both layers, those of either; beside it in a fleet, each of one layer draws what it draws alone."""
    asked = [Needs(inputs=(3,), windows=windows), Needs(inputs=(3, 4), windows=windows)]
    with Store.open(spiked["path"]) as store:
        feed, alone = make_feed(store, asked), make_feed(store, asked[:1])
        drawn = {needs: [] for needs in asked}
        for step in range(feed.plan.steps_in(1)):
            draw, other = feed.draw(step), alone.draw(step)
            assert torch.equal(draw.batch(asked[0]).x, other.batch(asked[0]).x)
            for needs in asked:
                kind = Kind(windows, needs.layers)
                assert len(draw.batch(needs).x) == len(draw.rows[kind].places)
                assert draw.batch(needs).x.norm(dim=1).max() < 40
                drawn[needs] += zip(
                    draw.store_windows(kind).tolist(), (draw.rows[kind].places % 8).tolist(), strict=True
                )
        feed.close()
        alone.close()
    for needs, places in drawn.items():
        planted = {place[1:] for place in TRAIN if place[0] in needs.layers}
        assert len(set(places)) == len(places) and not planted & set(places)
        assert len(places) > 6000 if windows else 64 * feed.plan.steps_in(1) - len(places) in range(4)


def test_processes_share_what_is_left(spiked):
    needs = Needs(inputs=(3,))
    with Store.open(spiked["path"]) as store:
        whole, *parts = make_feed(store, [needs]), *(make_feed(store, [needs], rank=rank, size=3) for rank in range(3))
        for step in (0, 50, 99):
            joined = torch.cat([part.draw(step).batch(needs).x for part in parts])
            assert torch.equal(joined, whole.draw(step).batch(needs).x)
        for feed in (whole, *parts):
            feed.close()


@pytest.mark.gpu
def test_a_gpu_leaves_out_what_a_cpu_leaves_out(spiked):
    needs = Needs(inputs=(3, 4))
    with Store.open(spiked["path"]) as store:
        gpu, cpu = (make_feed(store, [needs], device=name) for name in ("cuda", "cpu"))
        for step in range(gpu.plan.steps_in(1)):
            assert torch.equal(gpu.draw(step).batch(needs).x.cpu(), cpu.draw(step).batch(needs).x)
        gpu.close()
        cpu.close()


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_trained_saved_and_gone_on_with(spiked, sae_train, quick, rewind, tmp_path):
    """The whole way from the command, which on a card no test of a part goes."""
    words = ["--variant", "topk", *quick, "--device", "cuda", "--set", "course.checkpoint_every_steps=5"]
    sae_train(*words, "--cache", spiked["path"], "--tokens", 64 * 20, "--name", "one")
    before = (tmp_path / "runs/one/topk/sae_weights.safetensors").read_bytes()
    rewind(tmp_path / "runs/one")
    assert "continuing after step 15" in sae_train("--resume", "one", "--device", "cuda").output
    assert (tmp_path / "runs/one/topk/sae_weights.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (ALL_OF_40, "expected at least 2 tokens to measure a run on, found 0 in the first 40 windows"),
        (ALL_OF_40 - {(3, 70, 3)}, "measure a run on, found 1 in the first 40 windows"),
        ("most rows zero", "No others are left to train on. Set data.massive_norms=inf"),
    ],
)
def test_nothing_left_is_refused_before_the_run(write_store, sae_train, quick, tmp_path, planted, said, monkeypatch):
    if planted == "most rows zero":
        monkeypatch.setattr(massive_activations, "row_norms", lambda stored, *_: norms_of_mostly_nothing(stored))
        planted = []
    store = write_store(tmp_path / "store", windows=140, splits=(60, 100), massive=planted)
    assert said in sae_train(*TOPK, *quick, "--cache", store["path"], code=1).output
    assert not list((tmp_path / "runs").glob("*"))


def norms_of_mostly_nothing(stored):
    norms = np.zeros(stored.shape[:-1], np.float32)
    norms[:, -1] = 1
    return norms


@pytest.mark.parametrize("value", ["0.5", "-3", "many"])
def test_a_multiple_that_is_none_is_refused(spiked, sae_train, quick, value):
    words = [*TOPK, *quick, "--cache", spiked["path"], "--set", f"data.massive_norms={value}"]
    assert "massive_norms" in sae_train(*words, code=1).output
