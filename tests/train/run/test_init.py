"""`--init`: the first step rebuilds what the source rebuilds, whoever wrote it."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from saemill import Store
from saemill.cache_schema import ModelSpec
from saemill.train import load_sae
from saemill.train.data.scaling import Stats, unit_stats
from saemill.train.disk.formats import WRITERS
from saemill.train.disk.plain_form import centred, init_from, plain_sae
from saemill.train.disk.sae_lens_folder import load_plain_sae, save_sae
from saemill.train.errors import ConfigInvalid, SaeInvalid
from saemill.train.run.find_and_load_sae import read_folder
from saemill.train.run.init_from_trained_sae import require_model, require_unchanged, source_of

D, F = 32, 96
PLAIN = ("standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka")


@pytest.fixture
def stats(rng):
    return Stats(torch.full((D,), 0.37), torch.randn(D, generator=rng), float(D))


def moved(sae, rng):
    """As training might leave it: no table at its start, several lengths where the gate bears them."""
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "W_dec":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return sae


@pytest.mark.parametrize("variant", PLAIN)
def test_an_sae_begins_as_one_that_was_saved(variant, battery, stats, rng, tmp_path):
    """Trained elsewhere, in other units; begun here on a store of another scale."""
    trained = moved(battery.config_of(variant).build(D).sae, rng)
    if variant == "batchtopk":
        trained.gate.threshold.fill_(0.4)
    save_sae(tmp_path / "one", trained, unit_stats(D), {"layers": [19]}, {}, variant)
    source = load_plain_sae(tmp_path / "one")
    sae = battery.config_of(variant).build(D, stats).sae
    init_from(sae, source, stats, stats)
    x = torch.randn(200, D, generator=rng)
    torch.testing.assert_close(sae(x * stats.scale) / stats.scale, source(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))


OTHERS = [("sae_lens", variant) for variant in ("standard", "topk", "jumprelu", "gated")]
OTHERS += [("dictionary_learning", variant) for _, variant in OTHERS]
OTHERS += [("sparsify", "topk"), ("gemma_scope", "jumprelu")]


@pytest.mark.parametrize(("kind", "variant"), OTHERS)
def test_an_sae_begins_as_one_of_others(kind, variant, battery, stats, rng, tmp_path):
    """From the folder of each of the tools that SAEs are taken from."""
    trained = moved(battery.config_of(variant).build(D).sae, rng)
    plain = plain_sae(trained, unit_stats(D), unit_stats(D))
    folder = tmp_path / "gemma-scope-2b-pt-res/layer_19/width_16k/average_l0_71"
    if kind == "gemma_scope":
        tensors = {name: part.detach().numpy() for name, part in centred(plain, False).tensors.items()}
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **tensors)
    else:
        WRITERS[kind](folder, plain, {"layers": [19]})
    source, sae = read_folder(folder), battery.config_of(variant).build(D, stats).sae
    init_from(sae, source, stats, stats)
    x = torch.randn(200, D, generator=rng)
    assert (source.encode(x) > 0).any()
    torch.testing.assert_close(source(x), trained(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x * stats.scale) / stats.scale, source(x), rtol=1e-5, atol=1e-5)


def test_rows_of_several_lengths_begin_as_they_are_if_none_is_far_from_the_rest(battery, stats, rng, tmp_path):
    """sparsify saves means of unit rows, and transcoders whose rows have any length."""
    plain = plain_sae(moved(battery.config_of("topk").build(D).sae, rng), unit_stats(D), unit_stats(D))
    plain.tensors["W_dec"] *= torch.linspace(0.5, 1.0, F)[:, None]
    WRITERS["sparsify"](tmp_path / "a", plain, {"layers": [19]})
    source, sae = read_folder(tmp_path / "a"), battery.config_of("topk").build(D, stats).sae
    init_from(sae, source, stats, stats)
    x = torch.randn(200, D, generator=rng)
    torch.testing.assert_close(sae(x * stats.scale) / stats.scale, source(x), rtol=1e-5, atol=1e-5)
    plain.tensors["W_dec"][3] = 0.0
    WRITERS["sparsify"](tmp_path / "b", plain, {"layers": [19]})
    with pytest.raises(SaeInvalid, match="about the same length, found 0 to 1.3 times their mean"):
        init_from(sae, read_folder(tmp_path / "b"), stats, stats)


def test_a_threshold_below_zero_begins_as_the_zero_that_it_is(battery, stats, rng, tmp_path):
    """dictionary_learning's may fall below; its codes are rectified, and those of a training step are not."""
    plain = plain_sae(moved(battery.config_of("jumprelu").build(D).sae, rng), unit_stats(D), unit_stats(D))
    plain.tensors["threshold"] -= 2.0 * plain.tensors["threshold"].mean()
    assert (plain.tensors["threshold"] < 0).any() and (plain.tensors["threshold"] > 0).any()
    WRITERS["dictionary_learning"](tmp_path, plain, {"layers": [19]})
    source, sae = read_folder(tmp_path), battery.config_of("jumprelu").build(D, stats).sae
    init_from(sae, source, stats, stats)
    x = torch.randn(200, D, generator=rng)
    first_step = sae.reconstruct(sae.codes(x * stats.scale)) / stats.scale
    torch.testing.assert_close(first_step, source(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("centres", [True, False])
def test_an_encoder_that_is_centred_and_one_that_is_not_begin_alike(centres, battery, stats, rng):
    source = moved(battery.config_of("gated").build(D).sae, rng)
    source.centres_input = centres
    sae = battery.config_of("gated").build(D, stats).sae
    sae.centres_input = not centres
    init_from(sae, source, stats, stats)
    x = torch.randn(200, D, generator=rng)
    torch.testing.assert_close(sae(x * stats.scale) / stats.scale, source(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "sae", "message"),
    [
        (("topk", {"width": 64}), ("topk", {}), r"expected an SAE with 96 latents .* found 64 .*: set --width 64"),
        (("topk", {"k": 2}), ("topk", {}), "expected an SAE with 6 active latents, found 2: set --k 2"),
        (
            ("standard", {}),
            ("topk", {}),
            "the gate of topk, found .* of standard: .* such as --variant standard",
        ),
        (("topk", {}), ("positional", {"base": "topk"}), "consist only of their weights and gates"),
    ],
)
def test_what_cannot_begin_is_told(source, sae, message, battery, stats):
    made = [battery.config_of(name, **settings).build(D).sae for name, settings in (source, sae)]
    with pytest.raises(SaeInvalid, match=message):
        init_from(made[1], made[0], stats, stats)


def test_a_run_begins_where_another_ended(big, sae_train, quick, tmp_path):
    first = ["--variant", "topk", "--layer", 3, "--k", 4, "--width", 32, "--cache", big["path"]]
    sae_train(*first, *quick, "--tokens", 6400, "--name", "first")
    more = [*first, *quick, "--tokens", 640, "--lr", 1e-9, "--init", "first"]
    sae_train(*more, "--name", "second")
    one, two = (load_sae(tmp_path / "runs" / name) for name in ("first", "second"))
    x = torch.linspace(-3, 3, 50 * one.d_in).view(50, one.d_in)
    torch.testing.assert_close(two(x), one(x), rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "runs/second/config.json").read_text())
    assert config["init"]["folder"].endswith("runs/first/topk") and len(config["init"]["sha256"]) == 64
    result = sae_train(*more, "--width", 48, "--name", "third", code=1)
    assert "expected an SAE with 48 latents" in result.output and not (tmp_path / "runs/third").exists()


def test_a_run_goes_on_when_its_source_is_gone_and_begins_anew_only_with_it(big, sae_train, quick, tmp_path):
    first = ["--variant", "topk", "--layer", 3, "--k", 4, "--width", 32, "--cache", big["path"], *quick]
    sae_train(*first, "--tokens", 640, "--name", "first")
    more = [*first, "--tokens", 1280, "--init", "first", "--set", "course.checkpoint_every_steps=5", "--name", "second"]
    sae_train(*more)
    run = tmp_path / "runs/second"
    shutil.rmtree(tmp_path / "runs/first")
    (run / "result.json").unlink()
    assert "continuing after step" in sae_train("--resume", "second", "--device", "cpu").output
    shutil.rmtree(run / "checkpoints")
    (run / "result.json").unlink()
    assert "is missing" in sae_train("--resume", "second", "--device", "cpu", code=1).output


def test_what_does_not_go_with_it_is_told(big, sae_train, quick, tmp_path):
    first = ["--variant", "topk", "--layer", 3, "--k", 4, "--width", 32, "--cache", big["path"], *quick]
    sae_train(*first, "--tokens", 640, "--name", "first")
    result = sae_train(*first, "--tokens", 640, "--init", "first", "--with-baselines", code=1)
    assert (
        "or the baseline (--with-baselines or --variant frozen)" in result.output
        and not (tmp_path / "runs/run_1").exists()
    )
    for start in (("--set", "topk.optim.start=fitted"), ("--grid", "optim.start=fitted,drawn")):
        result = sae_train(*first, "--tokens", 640, "--init", "first", *start, code=1)
        assert "optim.start: SAEs that start from --init take no other start" in result.output


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"layers": [5], "target_layers": [5]},
            "expected an SAE from layer 3 to layer 3, found one from layer 5 to layer 5",
        ),
        ({"layers": [3], "target_layers": [3], "hook": "z", "target_hook": "z"}, "found one from z of layer 3"),
        (
            {"hook_name": "blocks.3.ln2.hook_normalized"},
            "it reads 'blocks.3.ln2.hook_normalized', which is not a known place",
        ),
    ],
)
def test_a_source_of_another_place_is_refused(big, sae_train, quick, tmp_path, battery, told, message):
    with Store(big["path"]) as store:
        sae = battery.config_of("topk", width=32, k=4).build(store.manifest.model.d_model).sae
    save_sae(tmp_path / "one", sae, unit_stats(sae.d_in), told, {}, "topk")
    words = [
        "--variant",
        "topk",
        "--layer",
        3,
        "--k",
        4,
        "--width",
        32,
        "--cache",
        big["path"],
        "--tokens",
        640,
        *quick,
    ]
    result = sae_train(*words, "--init", tmp_path / "one", code=1)
    assert message in " ".join(result.output.split()) and not (tmp_path / "runs").exists()


def test_a_source_of_another_model_is_refused_where_names_tell(tmp_path):
    """Not so of a file or folder, which may have any name, and of another tool's: gpt2-small is openai's gpt2."""
    model = ModelSpec("lab/model-2b", 8, "bfloat16", revision="0" * 40)
    require_model(tmp_path, "model-2b", model)
    require_model(tmp_path, None, model)
    with pytest.raises(ConfigInvalid, match="it was trained on lab/model-9b, but the store holds .* lab/model-2b"):
        require_model(tmp_path, "lab/model-9b", model)
    with pytest.warns(UserWarning, match="the names do not show whether that is the same model"):
        require_model(tmp_path, "model-small", model)
    with pytest.warns(UserWarning, match="the names do not show"):
        require_model(tmp_path, "lab/model-2b", replace(model, id="snapshot", revision="gguf-0123"))


def test_names_that_are_no_sae_end_the_command(big, sae_train, quick):
    result = sae_train("--variant", "topk", "--cache", big["path"], *quick, "--init", "no_such", code=1)
    assert "no SAE 'no_such'" in result.output


def test_a_source_that_cannot_be_read_ends_the_command(big, sae_train, quick, tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/sae_weights.safetensors").touch()
    refused = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "one/cfg.json"))
    # Root may read all.
    monkeypatch.setattr("saemill.train.run.init_from_trained_sae._digest", Mock(side_effect=refused))
    result = sae_train("--variant", "topk", "--cache", big["path"], *quick, "--init", tmp_path / "one", code=1)
    place = tmp_path / "one/cfg.json"
    assert f"error: permission denied: {place}. Change its permissions, or give another" in result.output
    refused = FileNotFoundError(errno.ENOENT, "No such file or directory", str(place))
    monkeypatch.setattr("saemill.train.run.init_from_trained_sae._digest", Mock(side_effect=refused))
    result = sae_train("--variant", "topk", "--cache", big["path"], *quick, "--init", tmp_path / "one", code=1)
    assert f"error: no such file or directory: {place}. Check the path, or give another" in result.output


def test_other_weights_of_gemma_scope_are_another_source(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.zeros(2))
    source = source_of(tmp_path)
    require_unchanged(source)
    np.savez(tmp_path / "params.npz", W_enc=np.ones(2))
    with pytest.raises(ConfigInvalid, match="or has changed since the run started"):
        require_unchanged(source)
