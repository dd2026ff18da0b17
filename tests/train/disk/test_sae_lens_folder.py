"""Saved SAEs: what is on disk computes what was trained, in raw units, by the formulas of the format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saemill.cache_schema.strict_json import to_json
from saemill.train.data.batch import Batch
from saemill.train.data.scaling import Stats, joined_stats, unit_stats
from saemill.train.disk.plain_form import init_from
from saemill.train.disk.sae_lens_folder import CONFIG, EXTRAS, TENSORS, WEIGHTS, load_plain_sae, read_sae, save_sae
from saemill.train.engine.step import Trainee
from saemill.train.errors import SaeInvalid
from saemill.train.kit.variant_registry import names
from saemill.train.run.find_and_load_sae import read_folder, rebuild
from saemill.train.sae.model import SparseAutoencoder
from saemill.train.sae.side_inputs import NO_SIDE, Side

from ... import mutations

D, WIDTH = 24, 64
IN_THE_FORMAT = ["topk", "batchtopk", "jumprelu", "matryoshka", "standard", "gated", "p_anneal", "abstopk", "tsae"]


def stats_of(seed: int) -> Stats:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.full((D,), 0.01 + 0.3 * float(torch.rand((), generator=generator)))
    return Stats(scale, torch.randn(D, generator=generator), float(D))


def trained(variant: str, battery):
    """A config, an SAE after a few steps on scaled rows, and the statistics it was built with."""
    config = battery.config_of(variant, width=WIDTH, k=5, target_l0=5.0)
    needs = config.needs()
    stats = joined_stats([stats_of(layer) for layer in needs.inputs])
    targets = () if needs.targets is None else (joined_stats([stats_of(9) for _ in needs.targets]),)
    assembly = config.build(D, stats, *targets)
    trainee = Trainee("one", assembly, 10)
    generator = torch.Generator().manual_seed(2)
    for _ in range(6):
        x = torch.randn(256, stats.width, generator=generator) + stats.mean
        y = None if not targets else torch.randn(256, targets[0].width, generator=generator)
        trainee.step(Batch(x, y, battery.side_of(needs, 256, generator)))
    return config, trainee.sae, assembly


def save(folder: Path, variant: str, battery):
    config, sae, assembly = trained(variant, battery)
    metadata = {"model_name": "pocket", "hook_name": "blocks.19.hook_resid_post"}
    needs = config.needs()
    metadata |= {"layers": list(needs.inputs), "target_layers": list(needs.targets or needs.inputs)}
    save_sae(
        folder,
        sae,
        assembly.input_stats,
        metadata,
        to_json(config),
        variant,
        assembly.target_stats,
        assembly.knobs_at(10, 10),
    )
    return sae, assembly


@pytest.mark.parametrize("variant", IN_THE_FORMAT)
def test_one_layer_variants_have_an_architecture_of_the_format(variant, tmp_path, battery):
    save(tmp_path, variant, battery)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["architecture"] in TENSORS
    assert config["metadata"]["sae_lens_version"] >= "6"
    assert config["metadata"]["training_architecture"] == variant
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("variant", ["transcoder", "skip_transcoder", "clt"])
def test_what_is_written_may_be_of_another_width_than_what_is_read(variant, tmp_path, rng, battery):
    """All heads of Gemma-2-2B are 2,048 wide side by side, its residual stream 2,304."""
    config = battery.config_of(variant, hook="z", to_hook="attn_out")
    layers = len(config.needs().inputs)
    read, written = (
        Stats(torch.full((width * layers,), scale), torch.randn(width * layers, generator=rng), width * layers)
        for width, scale in ((24, 0.5), (32, 2.0))
    )
    trainee = Trainee("one", config.build(24, read, written), 3)
    x = torch.randn(64, 24 * layers, generator=rng)
    for _ in range(3):
        trainee.step(Batch(x, torch.randn(64, 32 * layers, generator=rng)))
    save_sae(tmp_path, trainee.sae, read, {"layers": list(config.needs().inputs)}, to_json(config), variant, written)
    torch.testing.assert_close(read_sae(tmp_path, rebuild)(x / 0.5) * 2.0, trainee.sae(x), rtol=1e-4, atol=1e-4)


def test_what_a_process_left_that_was_killed_while_it_saved_goes(tmp_path, battery):
    (tmp_path / f".{WEIGHTS}.12345.tmp").touch()
    save(tmp_path, "topk", battery)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_a_skip_transcoder_is_what_sae_lens_makes_of_it(tmp_path, rng, battery):
    """By its formulas: x W_skip^T beside the decoder, and no bias taken off x; begun from its folder it is the same."""
    sae, assembly = save(tmp_path, "skip_transcoder", battery)
    config, w = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    named = {name: config[name] for name in ("architecture", "d_out", "hook_layer_out", "apply_b_dec_to_input")}
    assert named == {
        "architecture": "jumprelu_skip_transcoder",
        "d_out": D,
        "hook_layer_out": 20,
        "apply_b_dec_to_input": False,
    }
    raw = torch.randn(64, D, generator=rng) / assembly.input_stats.scale
    found = battery.official(tmp_path, raw)[1] + raw @ w["W_skip"].T
    trained_on = sae(raw * assembly.input_stats.scale).detach() / assembly.target_stats.scale
    torch.testing.assert_close(found, trained_on, rtol=1e-4, atol=1e-4)
    loaded = load_plain_sae(tmp_path)
    torch.testing.assert_close(loaded(raw), trained_on, rtol=1e-4, atol=1e-4)
    assert float(w["W_skip"].norm()) > 0
    again = battery.config_of("skip_transcoder", width=WIDTH, k=5).build(D).sae
    init_from(again, loaded, assembly.input_stats, assembly.target_stats)
    x_hat = again(raw * assembly.input_stats.scale).detach() / assembly.target_stats.scale
    torch.testing.assert_close(x_hat, trained_on, rtol=1e-4, atol=1e-4)
    with pytest.raises(SaeInvalid, match="without a skip, found one with"):
        plain = battery.config_of("transcoder", width=WIDTH, k=5, gate="batchtopk").build(D).sae
        init_from(plain, loaded, assembly.input_stats, assembly.target_stats)


@pytest.mark.parametrize(("variant", "gate"), [("crosscoder", "jumprelu"), ("transcoder", "topk")])
def test_what_the_format_cannot_say_has_a_name_of_our_own(variant, gate, tmp_path, battery):
    save(tmp_path, variant, battery)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["architecture"], config["gate"]) == (f"saemill_{variant}", gate)


def test_the_batchtopk_threshold_follows_the_folded_scale(tmp_path, battery):
    sae, assembly = save(tmp_path, "batchtopk", battery)
    scale = float(assembly.input_stats.scale[0])
    threshold = load_file(tmp_path / WEIGHTS)["threshold"]
    torch.testing.assert_close(threshold, (sae.gate.threshold / scale).float().expand(WIDTH))


@pytest.mark.parametrize("dead", [0, 2])
def test_topk_scores_scaled_by_decoder_norms_are_folded_on_load(dead, tmp_path, rng, battery):
    """`dead` rows are all zeros: such latents are never among the k, and write nothing."""
    w = {
        "W_enc": torch.randn(D, WIDTH, generator=rng),
        "b_enc": torch.randn(WIDTH, generator=rng),
        "W_dec": torch.randn(WIDTH, D, generator=rng) * 3,
        "b_dec": torch.randn(D, generator=rng),
    }
    w["W_dec"][:dead] = 0
    save_file(w, tmp_path / WEIGHTS)
    config = {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": True}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    x = torch.randn(9, D, generator=rng)
    norms = w["W_dec"].norm(dim=1)
    kept = torch.topk(((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms, 5)
    acts = torch.zeros(9, WIDTH).scatter(1, kept.indices, kept.values.relu())
    expected = (acts / norms.clamp_min(1e-30)) @ w["W_dec"] + w["b_dec"]
    torch.testing.assert_close(load_plain_sae(tmp_path)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "found no cfg.json"),
        (lambda folder: (folder / WEIGHTS).unlink(), "found none"),
        (lambda folder: (folder / CONFIG).write_text("{"), "is not JSON .* copy it again"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "expected an object, found list"),
        (lambda folder: (folder / CONFIG).write_text('{"architecture": "temporal"}'), "found 'temporal'"),
        (lambda folder: (folder / CONFIG).write_text('{"architecture": [[]]}'), "architecture as a str or null"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99), "damaged"),
        (lambda folder: save_file({"W_enc": torch.zeros(1)}, folder / WEIGHTS), "found none of b_enc, W_dec, b_dec"),
    ],
)
def test_a_damaged_folder_is_named(damage, message, tmp_path, battery):
    save(tmp_path, "topk", battery)
    damage(tmp_path)
    with pytest.raises(SaeInvalid, match=message):
        load_plain_sae(tmp_path)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("clt", {"training_architecture": 3}, "expected metadata.training_architecture as a str, found 3"),
        ("clt", {"training_architecture_details": None}, "training_architecture_details as a dict, found None"),
        ("clt", {"width": 10**18}, "no clt can be built from its settings"),
        ("clt", {"width": 2 * 10**9}, "do not have the variant's shapes"),
        ("clt", {"seed": 10**30}, "no clt can be built from its settings"),
        ("positional", {"scattered": True, "context": 10**12}, "the tensors are not those of the variant"),
        ("positional", {"adapters": True, "adapter_hidden": 10**9}, "the tensors are not those of the variant"),
    ],
)
def test_settings_that_are_not_those_of_the_weights_are_named_and_take_no_memory(
    variant, change, message, tmp_path, battery
):
    save(tmp_path, variant, battery)
    config = json.loads((tmp_path / CONFIG).read_text())
    metadata = config["metadata"]
    of_all = metadata.keys() & change.keys()
    (metadata if of_all else metadata["training_architecture_details"]).update(change)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with mutations.bounded_memory(), pytest.raises(SaeInvalid, match=f"^{tmp_path}.*{message}"):
        read_folder(tmp_path)


def test_what_needs_values_to_be_built_is_loaded_all_the_same(tmp_path, battery):
    def build(*settings):
        assert int(torch.arange(3).sum()) == 3
        return rebuild(*settings)

    def build_by_numpy(*settings):
        assert torch.arange(3).numpy().sum() == 3
        return rebuild(*settings)

    save(tmp_path, "clt", battery)
    assert read_sae(tmp_path, build).num_latents == read_sae(tmp_path, build_by_numpy).num_latents == WIDTH


@pytest.mark.parametrize("variant", names())
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"position_gate": True, "guidance": "encode", "mask": "soft", "range_encoders": True, "tier_norm": True},
        {"adapters": True, "scattered": True, "init": "orthogonal", "pre_norm": True, "hook": "mlp_in"},
    ],
    ids=["usual", "first", "second"],
)
def test_every_variant_can_be_built_of_shapes_alone(variant, settings, battery):
    config = battery.config_of(variant, **settings)
    targets = config.needs().targets
    with torch.device("meta"):
        config.build(D, None, *(() if targets is None else (unit_stats(D * len(targets)),)))


@pytest.mark.parametrize("kind", ["layer_norm", "expected_average_only_in"])
def test_weights_for_activations_that_are_normalised_first_are_refused(kind, tmp_path, battery):
    """The factor of the latter stands nowhere in the folder; SAELens says "none" once it is folded in."""
    save(tmp_path, "topk", battery)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"normalize_activations": kind}))
    with pytest.raises(SaeInvalid, match=f"normalize_activations '{kind}'"):
        load_plain_sae(tmp_path)


@pytest.mark.parametrize("told", [{"architecture": "standard"}, {"architecture": "topk"}, {"architecture": None}, {}])
def test_a_topk_of_sae_lens_before_6_is_one(told, tmp_path, rng, battery):
    """It was saved as standard, or as nothing, with topk for its activation."""
    save(tmp_path, "topk", battery)
    config = json.loads((tmp_path / CONFIG).read_text())
    own = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": config.pop("k")}, "normalize_activations": None}
    x = torch.randn(9, D, generator=rng)
    expected = load_plain_sae(tmp_path).encode(x)
    (tmp_path / CONFIG).write_text(json.dumps({"apply_b_dec_to_input": True, **own, **told}))
    assert torch.equal(load_plain_sae(tmp_path).encode(x), expected)


@pytest.mark.parametrize("told", [{"activation_fn_str": "tanh-relu"}, {"finetuning_scaling_factor": True}])
def test_what_sae_lens_before_6_computed_beside_a_plain_form_is_refused(told, tmp_path, battery):
    save(tmp_path, "standard", battery)
    config = json.loads((tmp_path / CONFIG).read_text())
    usual = {"activation_fn_str": "relu", "finetuning_scaling_factor": False, "normalize_activations": False}
    (tmp_path / CONFIG).write_text(json.dumps({**config, **usual}))
    load_plain_sae(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({**config, **usual, **told}))
    with pytest.raises(SaeInvalid, match="expected relu or topk as activation and no finetuning_scaling_factor"):
        load_plain_sae(tmp_path)


def test_topk_with_rows_of_several_lengths_is_saved_as_what_it_computes(tmp_path, battery, rng):
    """As sparsify leaves it: with rows of length one other latents would be among the k largest."""
    config, sae, assembly = trained("topk", battery)
    with torch.no_grad():
        sae.W_dec[: len(sae.W_dec) // 2] *= 2
        x = torch.randn(100, sae.d_in, generator=rng)
        save_sae(tmp_path, sae, assembly.input_stats, {}, to_json(config), "topk")
        scale = assembly.input_stats.scale
        torch.testing.assert_close(load_plain_sae(tmp_path)(x / scale) * scale, sae(x), rtol=1e-5, atol=1e-5)


class Shifted(SparseAutoencoder):
    """Activations of tokens behind a place are multiplied by a weight of their own."""

    is_plain = False
    needs_side = ("position",)

    def __init__(self, base: SparseAutoencoder) -> None:
        super().__init__(base.W_enc.data, base.W_dec.data, base.gate, base.b_dec.data, base.b_enc.data)
        self.factor = torch.nn.Parameter(torch.ones(base.num_latents))

    def encode(self, x: Tensor, side: Side = NO_SIDE) -> Tensor:
        late = (side["position"] > 4)[:, None] * side.knob("late", 0.0)
        return super().encode(x, side) * (1.0 + late * self.factor)


def test_an_inference_of_its_own_is_saved_whole(tmp_path, rng, battery):
    config, base, assembly = trained("topk", battery)
    sae = Shifted(base)
    sae.requires_grad_(False).factor += torch.rand(WIDTH, generator=rng)
    sae.extras["tiers"] = torch.nn.PReLU()
    settings, stats = to_json(config), assembly.input_stats
    save_sae(tmp_path, sae, stats, {}, settings, "topk", knobs={"late": 0.5})

    def rebuilt(variant, found, d_in, d_out):
        assert (variant, found, d_in) == ("topk", settings, D) and d_out in (D, 1)  # 1: of the damaged rows below
        return Shifted(config.build(D).sae)

    loaded = read_sae(tmp_path, rebuilt)
    position = torch.arange(9)
    raw = torch.randn(9, D, generator=rng) / stats.scale
    expected = sae.encode(raw * stats.scale, Side({"position": position}, {"late": 0.5}))
    acts = loaded.encode(raw, Side({"position": position}))
    assert torch.equal(acts > 0, expected > 0)
    torch.testing.assert_close(loaded.decode(acts), sae.decode(expected) / stats.scale, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(WIDTH))
    assert sorted(loaded.extras_tensors) == ["tiers.weight"]
    (tmp_path / EXTRAS).write_bytes(b"x")
    with pytest.raises(SaeInvalid, match="damaged"):
        read_sae(tmp_path, rebuilt)
    with pytest.raises(SaeInvalid, match="found 'saemill_topk'"):
        load_plain_sae(tmp_path)
    (tmp_path / EXTRAS).unlink()
    weights = load_file(tmp_path / WEIGHTS)
    for name in ("target_scale", "module.W_dec", "module.factor"):
        save_file(weights | {name: torch.ones(1)}, tmp_path / WEIGHTS)
        with pytest.raises(SaeInvalid, match=rf"the tensors {name} do not have the variant's shapes"):
            read_sae(tmp_path, rebuilt)
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(SaeInvalid, match=r"are not those of the variant \(factor, input_mean\)"):
        read_sae(tmp_path, lambda variant, found, d_in, d_out: config.build(D).sae)


def test_an_sae_whose_variant_is_not_here_says_what_it_needs():
    """Of a variant that lies in somebody's own folder, say."""
    with pytest.raises(SaeInvalid, match="it needs the file of variant mine: set SAEMILL_EXTRA to the folder"):
        rebuild("mine", {}, 4, 4)
