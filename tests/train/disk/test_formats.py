"""Every SAE through every format: the same codes and reconstructions come back."""

import json
import time
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from saemill.cache_schema import Site
from saemill.cache_schema.strict_json import to_json
from saemill.train import load_sae
from saemill.train.data.scaling import unit_stats
from saemill.train.disk.formats import FILES, WRITERS, read
from saemill.train.disk.hook_metadata import read_places
from saemill.train.disk.plain_form import PlainSae, centred, sae_from_plain, with_unit_rows, without_signs
from saemill.train.disk.sae_lens_folder import WEIGHT_SUFFIXES, save_sae
from saemill.train.errors import RunMissing, RunNotWritten, SaeInvalid
from saemill.train.export import _outputs, _relative_difference, _require_alike, export, main
from saemill.train.run.find_and_load_sae import list_saes
from saemill.train.sae.shapes.masks import HardMask
from saemill.train.sae.shapes.shaped_sae import ShapedAutoencoder

D, F = 6, 20


def largest_difference(one, other):
    """Between codes, and between reconstructions, relative to their size."""
    return max(_relative_difference(*pair) for pair in _outputs(one, other, None))


def make_plain(architecture, centres_input=True):
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {"W_enc": random(D, F), "W_dec": torch.nn.functional.normalize(random(F, D), dim=1), "b_dec": random(D)}
    if architecture == "gated":
        tensors |= {"b_gate": random(F), "b_mag": random(F), "r_mag": 0.3 * random(F)}
    else:
        tensors["b_enc"] = 0.3 * random(F)
    if architecture == "jumprelu":
        tensors["threshold"] = random(F).abs()
    return PlainSae(architecture, tensors, 3 if architecture.endswith("topk") else None, centres_input)


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_there_and_back(architecture, kind, tmp_path):
    """Only sparsify refuses, and only what it does not know."""
    plain = make_plain(architecture)
    if kind == "sparsify" and architecture != "topk":
        with pytest.raises(SaeInvalid, match="sparsify supports only topk SAEs"):
            WRITERS[kind](tmp_path, plain, {})
        return
    WRITERS[kind](tmp_path, plain, {"layers": [3], "model_name": "m"})
    assert largest_difference(plain, read(tmp_path)[0]) < 1e-5


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_an_export_that_does_not_rebuild_the_same_is_refused_and_gone(tmp_path, monkeypatch, architecture):
    plain, write = make_plain(architecture), WRITERS["dictionary_learning"]
    WRITERS["sae_lens"](tmp_path / "a", plain, {"layers": [3]})

    def write_another(folder, plain, metadata):
        write(folder, replace(plain, tensors=plain.tensors | {"b_dec": 1.1 * plain.tensors["b_dec"]}), metadata)

    monkeypatch.setitem(WRITERS, "dictionary_learning", write_another)
    words = [str(tmp_path / "a"), "--to", "dictionary_learning", "--out", str(tmp_path / "b")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1 and not (tmp_path / "b").exists()
    assert len(result.output.splitlines()) == 1 and "expected the written SAE to reconstruct" in result.output


def test_of_rows_whose_latents_are_near_a_tie_a_few_may_differ():
    """One in ten."""
    x_hat = torch.ones(40, D)
    found, more = x_hat.clone(), x_hat.clone()
    found[:4] *= 1.5
    more[:5] *= 1.5
    _require_alike(x_hat, found, may_flip=True)
    for other, may_flip in ((found, False), (more, True), (1.01 * x_hat, True), (torch.nan * x_hat, True)):
        with pytest.raises(SaeInvalid, match="of 40 random rows"):
            _require_alike(x_hat, other, may_flip)


FULL = (OSError(28, "No space left on device"), SafetensorError("No space left on device"))
DENIED = OSError(13, "Permission denied")


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("error", [*FULL, DENIED, KeyboardInterrupt()])
def test_an_export_that_is_stopped_leaves_nothing_and_a_full_disk_is_one_line(tmp_path, monkeypatch, error, is_there):
    WRITERS["sae_lens"](tmp_path / "a", make_plain("topk"), {"layers": [3], "model_name": "m"})

    def fill(folder, *_):
        folder.mkdir()
        (folder / "ae.safetensors").write_bytes(b"a part")
        raise error

    if is_there:
        (tmp_path / "b").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setitem(WRITERS, "dictionary_learning", fill)
    words = [str(tmp_path / "a"), "--to", "dictionary_learning", "--out", str(tmp_path / "b")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code and sorted(tmp_path.rglob("*")) == before
    if not isinstance(error, KeyboardInterrupt):
        assert len(result.output.splitlines()) == 1 and str(error) in result.output
        assert result.output.endswith(
            ": make room, or choose another --out\n" if error in FULL else "): choose another --out\n"
        )


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_an_export_that_is_stopped_while_its_files_are_moved_leaves_none(tmp_path, monkeypatch, error):
    WRITERS["sae_lens"](tmp_path / "a", make_plain("topk"), {"layers": [3]})
    (tmp_path / "b").mkdir()
    replace_ = Path.replace

    def move(path, place):
        if path.name == "sae.safetensors":
            assert (tmp_path / "b/cfg.json").stat().st_size and not list_saes(tmp_path / "b")  # weights come last
            raise error
        return replace_(path, place)

    monkeypatch.setattr(Path, "replace", move)
    with pytest.raises((RunNotWritten, KeyboardInterrupt)):
        export(tmp_path / "a", "sparsify", tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())


def test_what_a_killed_export_leaves_is_no_sae(tmp_path):
    """Beside the target, or in it if that was there; the same command then writes there."""
    WRITERS["sae_lens"](tmp_path / "a", make_plain("topk"), {"layers": [3]})
    for left in (".b.0123abcd.tmp", "b/.b.0123abcd.tmp"):
        WRITERS["sparsify"](tmp_path / left, make_plain("topk"), {"layers": [3]})
    assert list_saes(tmp_path) == [tmp_path / "a"] and list_saes(tmp_path / "b") == []
    export(tmp_path / "a", "sparsify", tmp_path / "b")
    assert list_saes(tmp_path) == [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize("is_there", [True, False])
def test_of_two_exports_into_one_folder_one_is_refused_and_the_other_stays(tmp_path, monkeypatch, is_there):
    WRITERS["sae_lens"](tmp_path / "a", make_plain("topk"), {"layers": [3], "model_name": "m"})
    words = [str(tmp_path / "a"), "--to", "sparsify", "--out", str(tmp_path / "b")]
    write = WRITERS["sparsify"]

    def write_meanwhile(folder, *args):
        monkeypatch.setitem(WRITERS, "sparsify", write)
        assert CliRunner().invoke(main, words).exit_code == 0
        write(folder, *args)

    if is_there:
        (tmp_path / "b").mkdir()
    monkeypatch.setitem(WRITERS, "sparsify", write_meanwhile)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1 and "not an empty folder" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert largest_difference(make_plain("topk"), read(tmp_path / "b")[0]) < 1e-5


def test_an_export_into_an_empty_folder_leaves_the_folder_as_it_is(tmp_path, monkeypatch):
    """The current one, one behind a link, one with modes of its own: none is replaced."""
    WRITERS["sae_lens"](tmp_path / "a", make_plain("topk"), {"layers": [3]})
    empty = tmp_path / "empty"
    empty.mkdir()
    empty.chmod(0o2770)
    before = empty.stat()
    (tmp_path / "link").symlink_to("empty")
    for target, cwd in ((Path("."), empty), (Path("link"), tmp_path)):
        monkeypatch.chdir(cwd)
        export(tmp_path / "a", "sparsify", target)
        assert sorted(path.name for path in empty.iterdir()) == ["cfg.json", "sae.safetensors"]
        assert (empty.stat().st_ino, empty.stat().st_mode) == (before.st_ino, before.st_mode)
        assert (tmp_path / "link").is_symlink()
        for file in empty.iterdir():
            file.unlink()


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_centring_moves_into_the_biases(architecture):
    plain = make_plain(architecture, centres_input=False)
    assert largest_difference(plain, centred(plain, True)) < 1e-5
    assert largest_difference(plain, centred(make_plain(architecture), False)) > 1e-3


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_a_signed_sae_has_two_latents_for_each_where_others_know_no_signs(kind, tmp_path):
    plain = make_plain("abstopk")
    WRITERS["sae_lens"](tmp_path / "a", plain, {"layers": [3]})
    assert export(tmp_path / "a", kind, tmp_path / "b") < 1e-5
    found, x = load_sae(tmp_path / "b"), torch.randn(9, D, generator=torch.Generator().manual_seed(0))
    one = sae_from_plain(plain)
    assert bool((one.encode(x) < 0).any()) and int((one.encode(x) != 0).sum()) == 9 * 3
    assert torch.allclose(found(x), one(x), atol=1e-5)
    assert found.num_latents == (F if kind == "sae_lens" else 2 * F)
    codes = without_signs(one).encode(x)
    assert bool((codes >= 0).all()) and torch.allclose(codes[:, :F] - codes[:, F:], one.encode(x), atol=1e-6)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk"])
def test_rows_get_length_one_where_they_have_another(architecture):
    """The same reconstructions; a top-k SAE, whose choice hangs on its codes, and one of unit rows stay as they are."""
    plain = make_plain(architecture)
    lengths = torch.linspace(0.25, 4, F)
    tensors = plain.tensors | {"W_dec": plain.tensors["W_dec"] * lengths[:, None]}
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    stretched = sae_from_plain(replace(plain, tensors=tensors))
    folded, unit = with_unit_rows(stretched), sae_from_plain(plain)
    assert with_unit_rows(unit) is unit
    assert (folded is stretched) == (architecture == "topk")
    torch.testing.assert_close(folded(x), stretched(x), rtol=1e-4, atol=1e-5)
    if architecture != "topk":
        torch.testing.assert_close(folded.W_dec, plain.tensors["W_dec"])
        torch.testing.assert_close(folded.encode(x), stretched.encode(x) * lengths, rtol=1e-4, atol=1e-5)


def test_a_signed_sae_behind_a_mask_has_no_form_without_signs():
    """It was measured without its mask."""
    masked = ShapedAutoencoder(sae_from_plain(make_plain("abstopk")), {"mask": HardMask(torch.arange(F) % 2, 8, 2)})
    with pytest.raises(SaeInvalid, match="found one with masks"):
        without_signs(masked)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"layers": 5}, "expected layers as a list of layers, such as [5], found 5"),
        ({"layers": [5], "target_layers": "5"}, "expected target_layers as a list of layers"),
        ({"layers": [5], "hook": "foo"}, "expected hook among resid"),
        ({"target_hook": ["foo"]}, "expected target_hook among resid"),
    ],
)
@pytest.mark.parametrize("kind", [*sorted(WRITERS), "circuit_tracer"])
def test_metadata_of_a_place_that_is_none_are_named(tmp_path, place, said, kind):
    WRITERS["sae_lens"](tmp_path / "a", make_plain("topk"), {"layers": [3]})
    config = json.loads((tmp_path / "a/cfg.json").read_text())
    (tmp_path / "a/cfg.json").write_text(json.dumps(config | {"metadata": place}))
    result = CliRunner().invoke(main, [str(tmp_path / "a"), "--to", kind, "--out", str(tmp_path / "b")])
    assert result.exit_code == 1 and said in result.output and not (tmp_path / "b").exists()


def test_dictionary_learning_by_its_own_formulas(tmp_path):
    """Its JumpReLU: relu(pre) where pre = x W_enc + b_enc exceeds the threshold, no bias taken off x."""
    plain = make_plain("jumprelu")
    WRITERS["dictionary_learning"](tmp_path, plain, {})
    w = load_file(tmp_path / "ae.safetensors")
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(0))
    pre = x @ w["W_enc"] + w["b_enc"]
    codes = torch.relu(pre * (pre > w["threshold"]))
    assert torch.allclose(codes, sae_from_plain(plain).encode(x), atol=1e-5)
    assert torch.allclose(codes @ w["W_dec"] + w["b_dec"], sae_from_plain(plain)(x), atol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["trainer"]["dict_class"] == "JumpReluAutoEncoder"
    assert "torch.save" in (tmp_path / "README.md").read_text()
    assert not list(tmp_path.glob("*.pt"))


def test_a_batch_top_k_from_dictionary_learning(tmp_path):
    """Its scalar threshold becomes one for each latent; an unset one is refused."""
    plain = make_plain("standard")
    tensors = {"encoder.weight": plain.tensors["W_enc"].t().contiguous(), "encoder.bias": plain.tensors["b_enc"]}
    tensors |= {"decoder.weight": plain.tensors["W_dec"].t().contiguous(), "b_dec": plain.tensors["b_dec"]}
    config = {"trainer": {"dict_class": "BatchTopKSAE", "k": 3, "layer": 4, "lm_name": "m"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({**tensors, "k": torch.tensor(3), "threshold": torch.tensor(0.7)}, tmp_path / "ae.safetensors")
    sae = load_sae(tmp_path)
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(0))
    pre = (x - plain.tensors["b_dec"]) @ plain.tensors["W_enc"] + plain.tensors["b_enc"]
    assert torch.allclose(sae.encode(x), torch.relu(pre) * (pre > 0.7), atol=1e-5)
    save_file({**tensors, "k": torch.tensor(3), "threshold": torch.tensor(-1.0)}, tmp_path / "ae.safetensors")
    with pytest.raises(SaeInvalid, match="learned threshold"):
        load_sae(tmp_path)


def test_a_pt_file_is_read_as_tensors_and_nothing_else(tmp_path):
    plain = make_plain("standard")
    WRITERS["dictionary_learning"](tmp_path, plain, {})
    tensors = load_file(tmp_path / "ae.safetensors")
    (tmp_path / "ae.safetensors").unlink()
    torch.save(tensors, tmp_path / "ae.pt")
    assert largest_difference(plain, read(tmp_path)[0]) < 1e-5
    torch.save({"code": Exploit()}, tmp_path / "ae.pt")
    with pytest.raises(SaeInvalid, match="expected plain tensors"):
        read(tmp_path)
    (tmp_path / "ae.pt").write_bytes(b"nothing")
    with pytest.raises(SaeInvalid, match="expected plain tensors"):
        read(tmp_path)


class Exploit:
    """What a reader of pickles would run."""

    def __reduce__(self):
        return exit, (3,)


@pytest.mark.parametrize(
    "setting",
    [
        ("activation", "groupmax"),
        ("skip_connection", True),
        ("k", 0),
        ("embed_skip", True),
        ("gram_lookup", {"n": 2}),
    ],
)
def test_sparsify_beyond_a_plain_form_is_refused(tmp_path, setting):
    WRITERS["sparsify"](tmp_path, make_plain("topk"), {})
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | dict([setting])))
    with pytest.raises(SaeInvalid, match=setting[0]):
        read(tmp_path)


def test_a_signed_sae_of_sparsify_keeps_its_signs(tmp_path):
    """By its own formula: the k furthest from zero, as they are."""
    WRITERS["sparsify"](tmp_path, make_plain("topk"), {})
    config, found = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"signed": True}))
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(2))
    pre = (x - found["b_dec"]) @ found["encoder.weight"].T + found["encoder.bias"]
    indices = pre.abs().topk(config["k"]).indices
    codes = torch.zeros(20, F).scatter_(1, indices, pre.gather(1, indices))
    assert bool((codes < 0).any())
    torch.testing.assert_close(load_sae(tmp_path)(x).detach(), codes @ found["W_dec"] + found["b_dec"])


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_sae_lens_knows_an_input_that_is_not_centred(tmp_path, architecture):
    """By apply_b_dec_to_input; dictionary_learning's JumpReLU is such a one."""
    plain = make_plain(architecture, centres_input=False)
    WRITERS["sae_lens"](tmp_path, plain, {"layers": [3]})
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["architecture"], config["apply_b_dec_to_input"]) == (architecture, False)
    assert largest_difference(plain, read(tmp_path)[0]) < 1e-5


def test_a_transcoder_of_sparsify_stays_one(tmp_path):
    WRITERS["sparsify"](tmp_path / "a", make_plain("topk"), {})
    config = json.loads((tmp_path / "a/cfg.json").read_text())
    (tmp_path / "a/cfg.json").write_text(json.dumps(config | {"transcode": True}))
    export(tmp_path / "a", "sae_lens", tmp_path / "b")
    assert json.loads((tmp_path / "b/cfg.json").read_text())["architecture"] == "saemill_topk"
    for folder in ("a", "b"):
        with pytest.raises(SaeInvalid, match="dictionary_learning has no format for it"):
            export(tmp_path / folder, "dictionary_learning", tmp_path / "c")


def test_a_skip_goes_to_sparsify_and_back(tmp_path):
    """By its own formula: codes of an input that is not centred, decoded, and the skip beside them."""
    plain = make_plain("topk", centres_input=False)
    skip = torch.randn(D, D, generator=torch.Generator().manual_seed(1))
    plain = replace(plain, tensors=plain.tensors | {"W_skip": skip})
    WRITERS["sparsify"](tmp_path / "a", plain, {"transcodes": True})
    config, found = json.loads((tmp_path / "a/cfg.json").read_text()), load_file(tmp_path / "a/sae.safetensors")
    assert config["transcode"] and config["skip_connection"]
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(2))
    top = torch.relu(x @ found["encoder.weight"].T + found["encoder.bias"]).topk(config["k"])
    codes = torch.zeros(20, F).scatter_(1, top.indices, top.values)
    y = codes @ found["W_dec"] + found["b_dec"] + x @ found["W_skip"].T
    torch.testing.assert_close(sae_from_plain(read(tmp_path / "a")[0])(x).detach(), y)
    (tmp_path / "a/cfg.json").write_text(json.dumps(config | {"transcode": False}))
    with pytest.raises(SaeInvalid, match="skip_connection"):
        read(tmp_path / "a")


@pytest.mark.parametrize(
    ("model", "is_refused"),
    [("google/gemma-2-2b", True), ("pocket", True), ("tiny-gemma2", True), ("google/gemma-2b", False), ("m", False)],
)
def test_a_transcoder_of_a_model_with_a_norm_behind_its_mlp_is_none_of_sparsify_s(tmp_path, model, is_refused):
    """There mlp_out is behind that norm, and sparsify hooks what the MLP gives before it."""
    place = {"layers": [3], "target_layers": [3], "hook": "mlp_in", "target_hook": "mlp_out", "model_name": model}
    WRITERS["sae_lens"](tmp_path / "a", make_plain("topk", centres_input=False), place)
    if is_refused:
        with pytest.raises(SaeInvalid, match=f"found one of {model}: its mlp_out is after a norm.* gate=batchtopk"):
            export(tmp_path / "a", "sparsify", tmp_path / "b")
        assert not (tmp_path / "b").exists()
    else:
        assert export(tmp_path / "a", "sparsify", tmp_path / "b") < 1e-5
    of_one_place = place | {"hook": "mlp_out"}  # what the norm gives: a module of its own, whose name the folder has
    WRITERS["sae_lens"](tmp_path / "c", make_plain("topk"), of_one_place)
    assert export(tmp_path / "c", "sparsify", tmp_path / "layers.3.post_feedforward_layernorm") < 1e-5


@pytest.mark.parametrize("hook", ["resid", "mlp_out", "z"])
def test_dictionary_learning_is_told_the_place_and_tells_it(tmp_path, hook):
    place = {"layers": [3], "target_layers": [3], "hook": hook, "target_hook": hook}
    WRITERS["dictionary_learning"](tmp_path, make_plain("topk"), place)
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert trainer["submodule_name"] == {"resid": "resid_post"}.get(hook, hook) + "_layer_3"
    assert read_places(read(tmp_path)[1]) == read_places(place)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("blocks.5.hook_mlp_out", Site("mlp_out", 5)),
        ("blocks.5.hook_resid_pre", 4),
        ("blocks.5.hook_resid_mid", None),  # nowhere here: no place is made up
    ],
)
def test_the_place_of_a_folder_of_sae_lens_goes_on_to_dictionary_learning(tmp_path, name, place):
    WRITERS["sae_lens"](tmp_path / "a", make_plain("topk"), {"hook_name": name})
    export(tmp_path / "a", "dictionary_learning", tmp_path / "b")
    told = read_places(read(tmp_path / "b")[1])
    assert (told and told.sides) == (place if place is None else ((place,), (place,)))


def test_the_place_of_a_folder_of_sparsify_goes_on_to_sae_lens(tmp_path):
    WRITERS["sparsify"](tmp_path / "layers.5", make_plain("topk"), {})
    export(tmp_path / "layers.5", "sae_lens", tmp_path / "b")
    metadata = json.loads((tmp_path / "b/cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["layers"]) == ("blocks.5.hook_resid_post", [5])


@pytest.mark.parametrize(
    ("trainer", "buffer", "said"),
    [
        ({"submodule_name": "mlp_layer_3"}, {}, "found 'mlp_layer_3'"),
        ({"submodule_name": {"a": 1}}, {}, "found {'a': 1}"),
        (
            {"submodule_name": "resid_post_layer_4"},
            {},
            "expected a submodule_name among resid_post_layer_3, mlp",
        ),
        ({}, {"io": "in"}, "io 'in'"),
    ],
)
def test_a_place_of_dictionary_learning_that_no_store_has_is_no_residual(tmp_path, trainer, buffer, said):
    WRITERS["dictionary_learning"](tmp_path, make_plain("topk"), {"layers": [3]})
    config = json.loads((tmp_path / "config.json").read_text())
    config = {"trainer": config["trainer"] | trainer, "buffer": buffer}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SaeInvalid, match=said):
        read(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "places"),
    [
        ({"hook_name": "blocks.3.hook_resid_pre"}, ((2,), (2,))),
        ({"hook_name": "model.layers.3"}, ((3,), (3,))),
        ({"hook_name": "blocks.3.attn.hook_z"}, ((Site("z", 3),), (Site("z", 3),))),
        ({"hook_name": "exported"}, None),
        ({"layers": [1, 2], "target_layers": [1, 2]}, ((1, 2), (1, 2))),
        ({"layers": [3], "hook": "mlp_in", "target_hook": "mlp_out"}, ((Site("mlp_in", 3),), (Site("mlp_out", 3),))),
        ({"hook_name": "blocks.3.ln2.hook_normalized"}, "it reads 'blocks.3.ln2.hook_normalized', which is no"),
        ({"hook_name": "layers.3.mlp", "transcodes": True}, r'"layers": \[5\], "hook": "mlp_in"'),
        ({"layers": [3], "hook": "mlp_out"}, ((Site("mlp_out", 3),), (Site("mlp_out", 3),))),
        ({"hook_name": "layer_3"}, ((3,), (3,))),
        ({"hook_name": "blocks.0.hook_resid_pre"}, "the input of the first layer"),
        ({"layers": [3], "hook": "mlp"}, "expected hook among resid, mlp_in"),
    ],
)
def test_places_are_read_from_metadata_as_far_as_they_say(metadata, places):
    if isinstance(places, str):
        with pytest.raises(SaeInvalid, match=places):
            read_places(metadata)
    else:
        told = read_places(metadata)
        assert (told and told.sides) == places


def test_a_transcoder_of_sparsify_may_be_told_its_place(tmp_path):
    WRITERS["sparsify"](tmp_path, make_plain("topk", centres_input=False), {"transcodes": True})
    assert read(tmp_path)[1]["transcodes"]
    place = {"layers": [3], "target_layers": [3], "hook": "mlp_in", "target_hook": "mlp_out"}
    config = json.loads((tmp_path / "cfg.json").read_text()) | {"metadata": place}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert read(tmp_path)[1] == place | {"hook_name": tmp_path.name}


def write_gemma_scope(folder, **changes):
    folder.mkdir(parents=True)
    tensors = make_plain("jumprelu", centres_input=False).tensors
    np.savez(folder / "params.npz", **{name: part.numpy() for name, part in tensors.items()} | changes)
    return tensors


def test_gemma_scope_by_its_own_formulas(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    w = write_gemma_scope(folder)
    plain, _ = read(folder)
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(2))
    pre = x @ w["W_enc"] + w["b_enc"]
    codes, sae = (pre > w["threshold"]) * torch.relu(pre), sae_from_plain(plain)
    assert 0 < (codes > 0).float().mean() < 1
    torch.testing.assert_close(sae.encode(x).detach(), codes)
    torch.testing.assert_close(sae(x).detach(), codes @ w["W_dec"] + w["b_dec"])
    assert export(folder, "sae_lens", tmp_path / "out") < 1e-5
    with pytest.raises(KeyError):
        WRITERS["gemma_scope"]


@pytest.mark.parametrize(
    ("home", "model", "name", "hook"),
    [
        ("gemma-scope-2b-pt-res", "gemma-2-2b", "hook_resid_post", "resid"),
        ("google--gemma-scope-9b-it-res", "gemma-2-9b-it", "hook_resid_post", "resid"),
        ("models--google--gemma-scope-9b-pt-mlp/snapshots/0a1b", "gemma-2-9b", "hook_mlp_out", "mlp_out"),
        ("layer_3_of_transcoders/gemma-scope-2b-pt-att", "gemma-2-2b", "attn.hook_z", "z"),
    ],
)
def test_gemma_scope_s_place_is_that_of_its_repository(tmp_path, home, model, name, hook):
    """Whatever folders above are called; for the Hub's cache see also `test_init.py`."""
    folder = tmp_path / home / "layer_20/width_16k/average_l0_71"
    write_gemma_scope(folder)
    place = {"layers": [20], "target_layers": [20], "hook": hook, "target_hook": hook}
    expected = {"model_name": f"google/{model}", "hook_name": f"blocks.20.{name}"} | place
    assert load_sae(folder).metadata == read(folder)[1] == expected
    export(folder, "sae_lens", tmp_path / "out")  # which reads the heads of `z` apart, and puts them side by side
    written = json.loads((tmp_path / "out/cfg.json").read_text())
    assert written["reshape_activations"] == ("hook_z" if hook == "z" else "none")


@pytest.mark.parametrize(
    ("home", "said"),
    [
        ("layer_3/mine/width_16k/average_l0_71", r'cfg\.json .*: \{"metadata": \{"layers": \[20\], "hook": "re'),
        ("gemma-scope-2b-pt-res/notes/layer_20/width_16k/average_l0_71", "expected the folder names of its repos"),
        ("gemma-scope-2b-pt-res/old_layer_20/width_16k/average_l0_71", "expected the folder names of its repository"),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "reconstructs the embedding"),
        ("gemma-scope-2b-pt-transcoders/layer_5/width_16k/average_l0_5", r'norm before its gain.*"layers": \[5\]'),
    ],
)
def test_gemma_scope_of_an_unknown_place_asks_for_it(tmp_path, home, said):
    write_gemma_scope(tmp_path / home)
    with pytest.raises(SaeInvalid, match=said):
        load_sae(tmp_path / home)


def test_gemma_scope_s_place_may_be_written_beside_it(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-transcoders/layer_5/width_16k/average_l0_5"
    write_gemma_scope(folder)
    told = {"layers": [5], "hook": "mlp_in", "target_hook": "mlp_out"}
    (folder / "cfg.json").write_text(json.dumps({"metadata": told}))
    names = {"hook_name": "blocks.5.mlp.hook_in", "hook_name_out": "blocks.5.hook_mlp_out"}
    assert read(folder)[1] == told | names | {"target_layers": [5]}
    of_layers, of_hook = ({"layers": [5, 6]}, {"layers": "5"}), ({"hook": "ln2"}, {"hook": ["resid"]})
    for wrong in ({}, {"layers": [5]}, *(told | one for one in (*of_layers, *of_hook))):
        (folder / "cfg.json").write_text(json.dumps({"metadata": wrong}))
        with pytest.raises(SaeInvalid, match=r"expected metadata with a single layer in layers"):
            read(folder)


def test_gemma_scope_with_a_factor_is_refused(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    write_gemma_scope(folder, scaling_factor=np.full(F, 2.0))
    with pytest.raises(SaeInvalid, match="scaling_factor"):
        read(folder)


def test_gemma_scope_that_is_no_archive_of_arrays_is_named(tmp_path):
    write_gemma_scope(tmp_path / "a", threshold=np.array([{}], object))
    with pytest.raises(SaeInvalid, match=r"params\.npz is damaged, or not an archive of plain arrays"):
        read(tmp_path / "a")
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "b/params.npz", W_enc=np.zeros((2, 2)))
    with pytest.raises(SaeInvalid, match="expected the arrays W_enc, b_enc"):
        read(tmp_path / "b")
    (tmp_path / "b/params.npz").write_bytes(b"PK but no archive")
    with pytest.raises(SaeInvalid, match="damaged"):
        read(tmp_path / "b")
    with (tmp_path / "b/params.npz").open("wb") as file:
        np.save(file, np.zeros(2))  # an array where an archive belongs
    with pytest.raises(SaeInvalid, match="damaged"):
        read(tmp_path / "b")


def test_a_folder_without_its_configuration_is_named(tmp_path):
    WRITERS["dictionary_learning"](tmp_path / "a", make_plain("topk"), {})
    (tmp_path / "a/config.json").unlink()
    result = CliRunner().invoke(main, [str(tmp_path / "a"), "--to", "sae_lens", "--out", str(tmp_path / "b")])
    assert result.exit_code == 1 and "expected config.json in" in result.output


def test_a_file_is_no_place_for_a_folder(tmp_path):
    WRITERS["sae_lens"](tmp_path / "a", make_plain("topk"), {})
    (tmp_path / "b").write_text("mine")
    result = CliRunner().invoke(main, [str(tmp_path / "a"), "--to", "sae_lens", "--out", str(tmp_path / "b")])
    assert result.exit_code == 1 and "choose another --out" in result.output
    assert (tmp_path / "b").read_text() == "mine"


def test_a_damaged_file_is_named(tmp_path):
    WRITERS["sparsify"](tmp_path, make_plain("topk"), {})
    data = (tmp_path / "sae.safetensors").read_bytes()
    (tmp_path / "sae.safetensors").write_bytes(data[:-50])
    with pytest.raises(SaeInvalid, match=r"sae\.safetensors: damaged"):
        read(tmp_path)


def test_what_others_have_no_form_for_is_refused(tmp_path):
    WRITERS["sae_lens"](tmp_path / "a", make_plain("topk"), {"layers": [1, 2]})
    with pytest.raises(SaeInvalid, match="one layer that reconstructs its input"):
        export(tmp_path / "a", "sparsify", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({"layers": [1, 2]}, r"resid \[1, 2\] to resid \[1, 2\]"),
        ({"layers": [1], "target_layers": [2]}, r"resid \[1\] to resid \[2\]"),
        ({"layers": [1], "hook": "mlp_in", "target_hook": "mlp_out", "target_layers": [2]}, r"mlp_in \[1\] to mlp_out"),
        ({"transcodes": True}, "to resid another place"),
    ],
)
def test_a_refusal_names_both_places_and_says_what_opens_the_folder(tmp_path, metadata, found):
    WRITERS["sae_lens"](tmp_path / "a", make_plain("standard", centres_input=False), metadata)
    with pytest.raises(SaeInvalid, match=f"found .*{found}.*: dictionary_learning has no .* which load_sae opens"):
        export(tmp_path / "a", "dictionary_learning", tmp_path / "b")


@pytest.mark.parametrize("kind", sorted(WRITERS))
@pytest.mark.parametrize("variant", ["treesae", "matching_pursuit", "clt"])
def test_an_encoder_that_no_other_tool_has_is_refused_in_words(battery, tmp_path, kind, variant):
    """Rather than as an unknown architecture, which says neither why nor what to do."""
    config = battery.config_of(variant, layers=(0, 1))
    sae = config.build(D).sae
    stats = unit_stats(sae.d_in)
    save_sae(tmp_path / "a", sae, stats, {"layers": [3]}, to_json(config), variant, stats)
    said = f"found one of {variant} with an encoder of its own, .* Keep its folder, which load_sae opens"
    with pytest.raises(SaeInvalid, match=said) as refused:
        export(tmp_path / "a", kind, tmp_path / "b")
    assert ("circuit_tracer" in str(refused.value)) == (variant == "clt") and not (tmp_path / "b").exists()
    load_sae(tmp_path / "a")


def test_the_command(tmp_path):
    WRITERS["sae_lens"](tmp_path / "runs/run_1/topk", make_plain("topk"), {"layers": [3]})
    words = ["run_1", "--runs", str(tmp_path / "runs"), "--to", "sparsify", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0 and "differ by" in result.output
    again = CliRunner().invoke(main, words, catch_exceptions=False)
    assert again.exit_code == 1 and "not an empty folder" in again.output


def test_what_trained_along_goes_to_our_own_format_and_is_said_to_be_left_out_of_others(tmp_path):
    """Without its tiers an SAE would be measured by equal shares, under the name of its variant."""
    WRITERS["sae_lens"](tmp_path / "a", make_plain("topk"), {"layers": [3]})
    extras = {"tiers.membership": torch.arange(F) % 3, "composition.C2": torch.ones(2, 3)}
    save_file(extras, tmp_path / "a/extras.safetensors")

    def export_to(kind, *options):
        words = [str(tmp_path / "a"), "--to", kind, "--out", str(tmp_path / f"{kind}{len(options)}"), *options]
        return CliRunner().invoke(main, words, catch_exceptions=False)

    assert "left out" not in export_to("sae_lens").output
    found = load_sae(tmp_path / "sae_lens0").extras_tensors
    assert found.keys() == extras.keys() and all(torch.equal(found[name], extras[name]) for name in extras)
    said = "left out: composition, tiers of extras.safetensors, for which sparsify has no place"
    assert said in export_to("sparsify").output.splitlines()
    assert json.loads(export_to("sparsify", "--json").stdout)["left_out"] == ["composition", "tiers"]


def test_rows_that_are_not_of_length_one_are_no_difference(tmp_path):
    """Their lengths move into the codes, of which SAELens' form has no others."""
    plain = make_plain("standard")
    lengths = torch.linspace(0.5, 2.0, len(plain.tensors["W_dec"]))[:, None]
    stretched = replace(plain, tensors={**plain.tensors, "W_dec": lengths * plain.tensors["W_dec"]})
    WRITERS["dictionary_learning"](tmp_path / "a", stretched, {})
    assert export(tmp_path / "a", "sae_lens", tmp_path / "b") < 1e-5


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_the_saes_of_another_tools_folder_are_found_below_it(tmp_path, kind):
    for label in ("trainer_1", "trainer_0"):
        WRITERS[kind](tmp_path / "out" / label, make_plain("topk"), {})
    assert list_saes(tmp_path / "out") == [tmp_path / "out" / label for label in ("trainer_0", "trainer_1")]
    (tmp_path / "out/config.json").write_text('{"cache": {}, "saes": {}}')  # of a run only its own are
    assert len(list_saes(tmp_path / "out")) == (2 if kind == "sae_lens" else 0)


def test_a_loaded_sae_says_what_it_reads_and_refuses_other_widths(tmp_path):
    WRITERS["sae_lens"](tmp_path / "a", make_plain("topk"), {"model_name": "somebody/model", "hook_name": "blocks.3.x"})
    sae = load_sae(tmp_path / "a")
    assert "  somebody/model, blocks.3.x: 6 -> 20 -> 6, k 3" in str(sae)
    with pytest.raises(
        ValueError, match=r"expected activations \[\.\.\., 6\] from somebody/model, blocks\.3\.x, found \[2, 7\]"
    ):
        sae.encode(torch.zeros(2, 7))
    assert "  an unnamed place: 6 -> 20 -> 6\n" in str(sae_from_plain(make_plain("standard")))


def test_an_sae_of_centred_residuals_is_told(tmp_path):
    """As SAELens' of GPT-2 small are: the harvest's residuals are not."""
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    WRITERS["sae_lens"](tmp_path / "a", make_plain("topk"), {})
    config = json.loads((tmp_path / "a/cfg.json").read_text())
    (tmp_path / "a/cfg.json").write_text(json.dumps(config | {"metadata": config["metadata"] | kwargs}))
    with pytest.warns(UserWarning, match="center_writing_weights"):
        load_sae(tmp_path / "a")


def test_finding_an_sae(tmp_path):
    for label in ("topk_k2", "topk_k4"):
        WRITERS["sae_lens"](tmp_path / "run_1" / label, make_plain("topk"), {})
    assert load_sae("run_1/topk_k2", tmp_path).num_latents == F
    with pytest.raises(RunMissing, match="holds 2 SAEs: choose one of"):
        load_sae("run_1", tmp_path)
    (tmp_path / "run_2").mkdir()
    with pytest.raises(RunMissing, match="holds no SAE in a known format"):
        load_sae("run_2", tmp_path)
    (tmp_path / "run_2/config.json").write_text('{"model_type": "llama"}')  # as a model's folder has
    with pytest.raises(RunMissing, match="holds no SAE in a known format"):
        load_sae("run_2", tmp_path)
    (tmp_path / "run_2/config.json").write_text('{"cache": {}, "saes": {}}')
    with pytest.raises(RunMissing, match="holds no trained SAE yet: resume its run with: sae-train --resume"):
        load_sae("run_2", tmp_path)
    WRITERS["sae_lens"](tmp_path / "run_2/topk", make_plain("topk"), {})
    (tmp_path / "run_2/topk/cfg.json").unlink()  # it comes last
    for name in ("run_2", "run_2/topk"):
        with pytest.raises(
            RunMissing, match="topk was not saved completely: resume its run with: sae-train --resume .*run_2$"
        ):
            load_sae(name, tmp_path)
    (tmp_path / "run_2/result.json").write_text("{}")  # there is nothing to resume
    with pytest.raises(SaeInvalid, match=r"found no cfg\.json"):
        load_sae("run_2/topk", tmp_path)
    for name in ("run_9", "run_9/"):
        with pytest.raises(RunMissing, match=r"no such folder; runs in .*: run_2. .* give owner/name"):
            load_sae(name, tmp_path)
    for name in ("./nope", "../nope/topk", "/nope", "~/nope"):
        with pytest.raises(RunMissing, match="no such folder$"):
            load_sae(name, tmp_path)


def test_the_hub_is_asked_for_what_is_not_here(tmp_path, monkeypatch):
    """Of its files those of the one SAE are downloaded, and no others."""
    import huggingface_hub

    asked = []

    def download(repository, allow_patterns, local_files_only):
        assert not local_files_only
        asked.append((repository, allow_patterns))
        WRITERS["sae_lens"](tmp_path / "hub/layer_3", make_plain("topk"), {})
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = [f"layer_3/{name}" for name in ("cfg.json", "sae_weights.safetensors", "extras.safetensors")]
    others = ["model-00001-of-00002.safetensors", "tokenizer.json", "layer_3/optimizer.pt", "layer_3/plots/a.json"]
    there = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files + others])
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: there)
    for name in ("owner/name/layer_3", "owner/name"):  # the only one is found
        assert load_sae(name, tmp_path / "runs").num_latents == F
        assert asked.pop() == ("owner/name", files)


@pytest.mark.parametrize("lost", [Exception("peer closed connection\nsee"), OSError("No space left"), OSError()])
def test_a_download_that_ends_early_is_told_in_a_line(tmp_path, monkeypatch, lost):
    """Its transport raises errors of its own, which are no errors of the Hub's library."""
    import huggingface_hub

    def download(*_, **__):
        raise lost

    there = SimpleNamespace(siblings=[SimpleNamespace(rfilename="sae_weights.safetensors")])
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: there)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    said = str(lost).partition("\n")[0] or "OSError"
    with pytest.raises(RunMissing, match=f"Asked the Hugging Face Hub for owner/name: {said}$"):
        load_sae("owner/name", tmp_path)


def test_a_run_that_is_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    WRITERS["sae_lens"](tmp_path / "runs/run_1/topk", make_plain("topk"), {})
    for name in ("run_1/tpok", "runs/run_1/tpok", "runs/run_7"):
        with pytest.raises(RunMissing, match=f"no SAE '{name}': no such folder"):
            load_sae(name, "runs")
    with pytest.raises(RunMissing, match="runs/run_1 holds runs/run_1/topk"):
        load_sae("run_1/tpok", "runs")


def test_without_the_hub_the_answer_comes_at_once(tmp_path, monkeypatch):
    """Offline nobody is asked; a name lookup that hangs is not waited for. What was downloaded before is found."""
    import huggingface_hub

    asked, is_over = [], Event()
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: asked.append(is_over.wait(60)))
    monkeypatch.setattr("saemill.train.run.find_and_load_sae.ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    began = time.monotonic()
    try:
        with pytest.raises(RunMissing, match=r"Asked the Hugging Face Hub for owner/name: no answer within 0.05 s"):
            load_sae("owner/name/folder", tmp_path)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(RunMissing, match="HF_HUB_OFFLINE is set"):
            load_sae("owner/name", tmp_path)
        WRITERS["sae_lens"](tmp_path / "before", make_plain("topk"), {})
        given = {True: tmp_path / "before"}  # by whether the cache alone was asked for
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **how: given[how["local_files_only"]])
        assert load_sae("owner/name", tmp_path).num_latents == F
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        said = r"owner/name: using commit before from the local cache, .* \(no answer within 0.05 seconds\)"
        with pytest.warns(UserWarning, match=said):
            assert load_sae("owner/name", tmp_path).num_latents == F
        assert time.monotonic() - began < 20 and not asked
    finally:
        is_over.set()


def test_every_kind_of_weights_is_among_those_that_a_digest_reads():
    assert {Path(name).suffix for name in FILES} <= set(WEIGHT_SUFFIXES)
