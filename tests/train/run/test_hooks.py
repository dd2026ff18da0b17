"""SAEs and transcoders on what MLPs read and write: trained from a store of hooks, saved under the hook's own name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from saemill import Store
from saemill.cache_schema import CorpusSpec, HookSpec, Manifest, ModelSpec, Site
from saemill.evaluate.cli import main as sae_eval
from saemill.train import load_sae
from saemill.train.disk.sae_lens_folder import is_of_one_place, read_config
from saemill.train.errors import StateInvalid
from saemill.train.export import main as sae_export
from saemill.train.kit import variant_registry

from ...write_shards import write_shards

WINDOWS, CONTEXT, WIDTH, ATOMS, LAYER = 600, 8, 12, 24, 5
WORDS = ["--device", "cpu", "--set", "data.batch_tokens=128", "--set", "course.validation_tokens=512", "--no-plots"]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A store whose `mlp_out` is another dictionary times the very codes that made `mlp_in`, and of queries as wide as
    two residuals."""
    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((3, ATOMS, WIDTH))
    atoms /= np.linalg.norm(atoms, axis=-1, keepdims=True)
    chosen = rng.permuted(np.tile(np.arange(ATOMS), (WINDOWS, CONTEXT, 1)), axis=-1)[..., :2]
    weights = rng.uniform(2, 5, chosen.shape)[..., None]
    values = [(table[chosen] * weights).sum(axis=-2).astype(np.float32) for table in atoms]
    acts = dict(zip((Site("resid", LAYER), Site("mlp_in", LAYER), Site("mlp_out", LAYER)), values, strict=True))
    acts[Site("q", LAYER)] = np.concatenate(values[:2], axis=-1)
    tokens = rng.integers(1, 50, (WINDOWS, CONTEXT)).astype(np.uint32)
    manifest = Manifest(
        model=ModelSpec("test/model", WIDTH, dtype="float32"),
        corpus=CorpusSpec("test/corpus"),
        context=CONTEXT,
        layers=(LAYER,),
        windows=WINDOWS,
        splits={"train": (0, 500), "validation": (500, 550), "test": (550, WINDOWS)},
        shard_windows=50,
        hooks={hook: HookSpec((LAYER,), width) for hook, width in (("mlp_in", 12), ("mlp_out", 12), ("q", 24))},
    )
    path = write_shards(tmp_path_factory.mktemp("stores") / "hooks", manifest, tokens, tokens * 0, acts)
    return path, acts, atoms


@pytest.mark.parametrize("hook", ["mlp_in", "q"])
def test_batches_for_others_trainers_are_those_of_the_hook(planted, hook):
    path, acts, _ = planted
    with Store(path) as store:
        batches = store.batches(LAYER, hook=hook, batch_tokens=100, shuffle=False, massive_norms=None, device="cpu")
        x, state = next(batches), batches.state_dict()
        rows = acts[Site(hook, LAYER)].reshape(-1, acts[Site(hook, LAYER)].shape[-1])
        assert np.array_equal(x.numpy(), rows[:100]) and len(batches) == 40
        other = store.batches(LAYER, batch_tokens=100, shuffle=False, massive_norms=None, device="cpu")
        with pytest.raises(StateInvalid, match="hook|layers"):
            other.load_state_dict(state)
        batches.close()
        other.close()


def test_a_transcoder_finds_the_planted_map(planted, sae_train, tmp_path):
    """Each latent reads one atom of what the MLP reads, and writes the atom that has the same code."""
    path, acts, atoms = planted
    words = ["--variant", "transcoder", "--set", "hook=mlp_in", "--set", "width=48", "--set", "k=2"]
    result = sae_train(*words, "--cache", path, "--epochs", 12, "--set", "optim.lr=0.01", *WORDS)
    assert f"hook mlp_in, layer {LAYER}, " in result.output
    folder = tmp_path / "runs/run_1/transcoder"
    sae = load_sae(folder)
    x, y = (torch.from_numpy(acts[Site(hook, LAYER)][550:]).flatten(0, 1) for hook in ("mlp_in", "mlp_out"))
    left = (sae(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert left < 0.3
    read, written = (torch.nn.functional.normalize(w, dim=1) for w in (sae.W_enc.detach(), sae.W_dec.detach()))
    nearest = (written @ torch.from_numpy(atoms[2]).float().T).max(1)
    found = nearest.values > 0.9
    assert len(set(nearest.indices[found].tolist())) > ATOMS / 2
    reads = (read[found] @ torch.from_numpy(atoms[1]).float().T).argmax(1)
    assert (reads == nearest.indices[found]).double().mean() > 0.9

    config = read_config(folder)
    metadata = config["metadata"]
    assert metadata["hook_name"] == f"blocks.{LAYER}.mlp.hook_in"
    assert metadata["hook_name_out"] == f"blocks.{LAYER}.hook_mlp_out"
    assert (metadata["hook"], metadata["target_hook"]) == ("mlp_in", "mlp_out")
    assert config["architecture"] == "saemill_transcoder" and not is_of_one_place(metadata)
    words = [str(folder), "--out", str(tmp_path / "out"), "--to"]
    refused = CliRunner().invoke(sae_export, [*words, "dictionary_learning"])
    assert refused.exit_code == 1 and "to mlp_out [5]: dictionary_learning has no format for it" in refused.output
    assert CliRunner().invoke(sae_export, [*words, "sparsify"]).exit_code == 0
    torch.testing.assert_close(load_sae(tmp_path / "out")(x), sae(x), rtol=1e-4, atol=1e-5)


def test_a_variant_of_one_layer_trains_on_any_hook(planted, sae_train, tmp_path):
    assert replace(variant_registry.config_type("attention")(base="topk"), hook="mlp_out").needs().hook == "mlp_out"
    sizes = ["--set", "width=48", "--set", "k=2", "--epochs", 12, "--set", "optim.lr=0.01"]
    sae_train("--variant", "topk", "--set", "hook=mlp_out", *sizes, "--cache", planted[0], *WORDS)
    folder = tmp_path / "runs/run_1/topk"
    result = json.loads((tmp_path / "runs/run_1/result.json").read_text())
    assert result["saes"]["topk"]["explained_variance"] > 0.7
    sae, x = load_sae(folder), torch.from_numpy(planted[1][Site("mlp_out", LAYER)][550:]).flatten(0, 1)
    assert (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum() < 0.3
    config = read_config(folder)
    assert config["metadata"]["hook_name"] == f"blocks.{LAYER}.hook_mlp_out" and config["architecture"] == "topk"
    out = CliRunner().invoke(sae_export, [str(folder), "--to", "sae_lens", "--out", str(tmp_path / "out")])
    assert out.exit_code == 0, out.output
    assert read_config(tmp_path / "out")["metadata"]["hook_name"] == f"blocks.{LAYER}.hook_mlp_out"


def test_hooks_may_be_wider_than_the_residual_and_stand_beside_others(planted, sae_train, tmp_path):
    words = ["--variant", "topk", "--grid", "hook=resid,q", "--set", "width=32", "--set", "k=2", "--tokens", 1280]
    sae_train(*words, "--cache", planted[0], *WORDS)
    widths = {p.name: load_sae(p).d_in for p in sorted((tmp_path / "runs/run_1").glob("topk_*"))}
    assert widths == {"topk_hookq": 24, "topk_hookresid": 12}


def test_a_resumed_run_on_hooks_is_the_same(planted, sae_train, same_bits, tmp_path, rewind):
    words = ["--variant", "transcoder", "--set", "hook=mlp_in", "--set", "width=32", "--set", "k=2", "--tokens", 2560]
    words += ["--cache", planted[0], "--set", "course.checkpoint_every_steps=7", *WORDS]
    sae_train(*words, "--name", "straight")
    again = shutil.copytree(tmp_path / "runs/straight", tmp_path / "runs/again")
    rewind(again)
    sae_train("--resume", "again", "--device", "cpu")
    same_bits(again, tmp_path / "runs/straight")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["transcoder", "--set", "hook=z"], "z of layers 19, 20 (it has none)"),
        (["topk", "--set", "hook=mlpout"], "hook: unknown hook 'mlpout' (did you mean 'mlp_out'"),
        (["transcoder", "--set", "hook=mlp_in", "--set", "to_hook=attn"], "to_hook: unknown hook 'attn'"),
        (["transcoder", "--layer", "5", "--set", "to_layer=5"], "expected a layer other than 5"),
        (["topk", "--layer", "4", "--set", "hook=mlp_in"], "mlp_in of layer 4 (it has layer 5)"),
    ],
)
def test_what_a_store_lacks_is_named_before_work(planted, sae_train, tmp_path, words, said):
    result = sae_train("--variant", *words, "--cache", planted[0], "--tokens", 1280, *WORDS, code=1)
    assert said in result.output
    assert not list(tmp_path.glob("runs/*"))


def test_all_hooks_that_are_missing_come_in_one_message(written, sae_train):
    words = ["--variant", "transcoder", "--set", "hook=mlp_in", "--layer", 3, "--cache", written["path"]]
    said = sae_train(*words, *WORDS, "--set", "data.batch_tokens=64", code=1).output
    assert "mlp_in of layer 3 (it has none) and mlp_out of layer 3 (it has none)" in said and "--hooks" in said


def test_old_settings_of_a_transcoder_mean_what_they_meant():
    config = variant_registry.config_type("transcoder")
    needs = config().needs()
    assert (needs.inputs, needs.targets, needs.layers) == ((19,), (20,), (19, 20))
    assert config(layer=3, to_layer=4).needs().layers == (3, 4)
    needs = config(layer=3, hook="mlp_in").needs()
    assert needs.layers == (Site("mlp_in", 3), Site("mlp_out", 3))


def test_evaluations_say_not_run_and_never_a_wrong_number(planted, sae_train, tmp_path):
    words = ["--variant", "topk", "--set", "hook=mlp_out", "--set", "width=32", "--set", "k=2", "--tokens", 256]
    sae_train(*words, "--cache", planted[0], *WORDS)
    run = Path(tmp_path / "runs/run_1")
    asked = [str(run), "--evals", "core,unlearning,decoder_cosine", "--no-plots", "--device", "cpu"]
    result = CliRunner().invoke(sae_eval, asked)
    assert result.exit_code == 3, result.output
    said = " ".join(result.output.replace("│", " ").split())
    assert said.count("it reads mlp_out of layer 5") == 2
    assert not list(run.glob("evals/*core*")) and list(run.glob("evals/*cosine*/*"))
