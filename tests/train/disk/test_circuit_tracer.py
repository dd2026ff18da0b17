"""Transcoders in circuit-tracer's folders: names, shapes and configuration, and the numbers by its formulas."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from saemill.cache_schema.strict_json import to_json
from saemill.train.data.batch import Batch
from saemill.train.data.scaling import Stats, joined_stats
from saemill.train.disk.formats import circuit_tracer
from saemill.train.disk.sae_lens_folder import save_sae
from saemill.train.engine.step import Trainee
from saemill.train.export import export_set, main
from saemill.train.kit.variant_registry import config_type
from saemill.train.run.find_and_load_sae import read_folder

D, F, L = 6, 20, 3


def stats_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return Stats(torch.full((D,), 0.3 + 0.1 * seed), torch.randn(D, generator=generator), float(D))


def trained(folder, variant, layers, **settings):
    """An SAE of mlp_in and mlp_out after a few steps, saved as a run saves it."""
    settings |= {"hook": "mlp_in", "k": 4} | ({"layers": layers} if variant == "clt" else {"layer": layers[0]})
    config = config_type(variant)(**settings)
    stats, targets = (joined_stats([stats_of(layer + more) for layer in layers]) for more in (0, 5))
    assembly = config.build(D, stats, targets)
    trainee, generator = Trainee("one", assembly, 10), torch.Generator().manual_seed(layers[0])
    for _ in range(8):
        x = torch.randn(64, len(layers) * D, generator=generator)
        trainee.step(Batch(x + stats.mean, x.roll(1, 1) + targets.mean))
    metadata = {"model_name": "pocket", "hook": "mlp_in", "target_hook": "mlp_out"}
    metadata |= {"layers": list(layers), "target_layers": list(layers)}
    save_sae(folder, trainee.sae, stats, metadata, to_json(config), variant, targets)
    return folder


def config_of(folder):
    return json.loads((folder / "config.yaml").read_text())


@pytest.mark.parametrize("variant", ["transcoder", "skip_transcoder"])
def test_a_transcoder_for_each_layer(tmp_path, variant):
    """In whatever order they are named."""
    folders = [trained(tmp_path / f"run/{9 - i}", variant, (i,), width=F, gate="batchtopk") for i in range(L)]
    assert export_set(sorted(folders), tmp_path / "out") < 1e-5
    assert config_of(tmp_path / "out") == {
        "model_kind": "transcoder_set",
        "model_name": "pocket",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }
    shapes = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "activation_function.threshold": (F,)}
    shapes |= {"W_skip": (D, D)} if variant == "skip_transcoder" else {}
    for i in range(L):
        w = load_file(tmp_path / f"out/layer_{i}.safetensors")
        assert {name: tuple(tensor.shape) for name, tensor in w.items()} == shapes
    x = torch.randn(9, L, D, generator=torch.Generator().manual_seed(0))
    last = read_folder(folders[-1])
    assert bool((last.encode(x[:, -1]) > 0).any())
    torch.testing.assert_close(circuit_tracer.reconstruct(tmp_path / "out", x)[:, -1], last(x[:, -1]).detach())


def test_a_cross_layer_transcoder(tmp_path):
    folder = trained(tmp_path / "run/clt", "clt", tuple(range(L)), width=L * F)
    result = CliRunner().invoke(main, [str(tmp_path / "run"), "--to", "circuit_tracer", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and "read back: reconstructions differ by" in result.output
    assert config_of(tmp_path / "out")["model_kind"] == "cross_layer_transcoder"
    for i in range(L):
        w = load_file(tmp_path / f"out/W_enc_{i}.safetensors")
        shapes = {f"W_enc_{i}": (F, D), f"b_enc_{i}": (F,), f"b_dec_{i}": (D,), f"threshold_{i}": (F,)}
        assert {name: tuple(tensor.shape) for name, tensor in w.items()} == shapes
        (W_dec,) = load_file(tmp_path / f"out/W_dec_{i}.safetensors").values()
        assert tuple(W_dec.shape) == (F, L - i, D)
    sae, x = read_folder(folder), torch.randn(9, L, D, generator=torch.Generator().manual_seed(0))
    assert bool((sae.encode(x.flatten(1)) > 0).any())
    assert bool((sae.W_dec.view(L, F, L, D)[0, :, 1:] != 0).any())
    x_hat = sae(x.flatten(1)).detach().view(9, L, D)
    torch.testing.assert_close(circuit_tracer.reconstruct(tmp_path / "out", x), x_hat, rtol=1e-4, atol=1e-4)


def test_a_cross_layer_transcoder_may_write_another_width_than_it_reads(tmp_path):
    """As one does that reads the heads' outputs."""
    config = config_type("clt")(layers=(0, 1), hook="z", to_hook="mlp_out", width=2 * F, k=4)
    wide = Stats(torch.full((2 * D,), 0.5), torch.zeros(2 * D), float(2 * D))
    stats, targets = joined_stats([wide, wide]), joined_stats([stats_of(5), stats_of(6)])
    sae = config.build(2 * D, stats, targets).sae
    metadata = {"hook": "z", "target_hook": "mlp_out", "layers": [0, 1], "target_layers": [0, 1]}
    save_sae(tmp_path / "clt", sae, stats, metadata, to_json(config), "clt", targets)
    assert export_set([tmp_path / "clt"], tmp_path / "out") < 1e-5


def test_an_export_that_cannot_be_read_back_leaves_nothing(tmp_path, monkeypatch):
    folder = trained(tmp_path / "run/clt", "clt", (0, 1), width=2 * F)
    monkeypatch.setattr(circuit_tracer, "reconstruct", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_set([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_it_has_no_form_for_is_refused(tmp_path):
    def said(*folders):
        result = CliRunner().invoke(
            main, [str(folders[0].parent), "--to", "circuit_tracer", "--out", str(tmp_path / "o")]
        )
        assert result.exit_code == 1 and not (tmp_path / "o").exists()
        return " ".join(result.output.split())

    assert "each layer, starting at 0, found layers [1]" in said(trained(tmp_path / "a/1", "transcoder", (1,), width=F))
    assert "Train them with --set gate=batchtopk" in said(trained(tmp_path / "b/0", "transcoder", (0,), width=F))
    both = [trained(tmp_path / f"c/{i}", "skip_transcoder", (i,), width=F + i) for i in range(2)]
    assert "with the same hooks and width" in said(*both)
    uneven = trained(tmp_path / "d/clt", "clt", (0, 1), width=2 * F + 1)
    assert "the same number of latents in every layer" in said(uneven)
    trained(tmp_path / "e/clt", "clt", (0, 1), width=2 * F)
    beside = trained(tmp_path / "e/transcoder", "transcoder", (2,), width=2 * F, gate="batchtopk")
    assert "expected a single clt" in said(beside)
    assert "or a clt of several layers" in said(trained(tmp_path / "f/clt", "clt", (0,), width=F))
    config = json.loads((uneven / "cfg.json").read_text())
    config["metadata"] |= {"hook": "resid", "target_hook": "resid"}
    (uneven / "cfg.json").write_text(json.dumps(config))
    assert "expected transcoders that write mlp_out, found resid to resid: circuit-tracer replaces" in said(uneven)
    for name in ("hook", "target_hook", "layers"):  # an SAE of residuals names no hook
        del config["metadata"][name]
    (uneven / "cfg.json").write_text(json.dumps(config))
    assert "found resid to resid: circuit-tracer replaces MLPs. Train --variant transcoder" in said(uneven)
