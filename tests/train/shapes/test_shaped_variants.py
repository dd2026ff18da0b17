"""Tiered, positional and temporal SAEs: on any base, nothing but the base where all is off, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from saemill.cache_schema.strict_json import to_json
from saemill.train import load_sae
from saemill.train.disk.sae_lens_folder import save_sae
from saemill.train.errors import ConfigInvalid
from saemill.train.kit.variant_registry import config_type
from saemill.train.sae.shapes.shaped_sae import ShapedAutoencoder
from saemill.train.sae.side_inputs import Side

BASES = ("standard", "topk", "batchtopk", "jumprelu", "gated", "p_anneal")
OFF = {
    "tiered": {"importance": "fixed", "tier_weights": (0.0, 0.0, 1.0), "composition_weight": 0.0},
    "positional": {"mask": "static_slicing"},
    "temporal": {"temporal_weights": (0.0, 0.0, 0.0)},
}
SETTINGS = {
    "tiered": [
        {"importance": "fixed"},
        {"importance": "uncertainty", "gradient_scaling": True},
        {"tier_norm": True, "tier_clip_norm": 0.1, "init": "xavier"},
        {"curriculum": (0.0, 0.1, 0.2), "moves_every_steps": 3, "idle_frequency": 0.5},
        {"boundaries": (10, 40, 96)},
        {"moves_every_steps": 3, "moves_live": True, "resample_every_steps": 4, "dead_after_tokens": 600},
    ],
    "positional": [
        {"mask": "soft"},
        {"mask": "soft", "progressive": (0.0, 0.5), "learned_coefficient": True},
        {"l1_before_mask": True, "pre_norm": True},
        {"mask": "none", "range_encoders": True, "position_embeddings": True, "init": "orthogonal"},
        {"mask": "none", "adapters": True, "adapter_from": (0.1, 0.3), "adapter_lr_scale": 0.3},
        {"mask": "none", "adapters": True, "adapters_on": "features", "adapter_from": (0.1, 0.3), "adapted_rate": 0.3},
        {
            "mask": "soft",
            "pre_norm": True,
            "norm_rectified": True,
            "range_encoders": True,
            "independent_encoders": True,
        },
    ],
    "temporal": [
        {"adaptive": "gradient", "position_gate": True},
        {"adaptive": "variance", "half_life_fraction": 0.2, "progressive_window": 8},
        {"buffer_mixing": 0.25, "buffer_std": 0.1, "gradient_noise": 0.1, "reconstruction_boost": 1.0, "idle_steps": 4},
        {"variance_floor": 0.1, "prune_share": 0.5, "prune_from": 0.2, "prune_every_steps": 2, "aux_k": 4},
    ],
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", OFF)
def test_with_everything_off_it_is_its_base_to_the_bit(variant, base, battery, shaping):
    config = battery.quick(variant, base=base, **OFF[variant])
    plain = dataclasses.replace(battery.quick(base), encoder_product=config.encoder_product)
    batches = battery.batches(config, 5)
    assert shaping.same_bits_as(config.build(battery.D), plain.build(battery.D), batches, 5) == []


@pytest.mark.parametrize("variant", OFF)
def test_with_its_defaults_it_is_not_its_base(variant, battery, shaping):
    config, plain = battery.quick(variant), battery.quick("standard")
    batches = battery.batches(config, 8)
    assert "W_enc" in shaping.same_bits_as(config.build(battery.D), plain.build(battery.D), batches, 8)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", OFF)
def test_every_base_can_be_wrapped(variant, base, battery):
    config = battery.quick(variant, base=base)
    _, reports = battery.train(config, battery.STEPS if base == BASES[0] else 12)
    assert float(reports[-1].measured["loss/reconstruction"]) < float(reports[0].measured["loss/reconstruction"])


@pytest.mark.parametrize("variant, settings", [(v, s) for v, each in SETTINGS.items() for s in each])
def test_every_setting_trains_and_goes_on_to_the_same_bits(variant, settings, battery):
    assert battery.changed_by_resuming(battery.quick(variant, **settings), 12) == []


@pytest.mark.parametrize("variant, settings", [(v, s) for v, each in SETTINGS.items() for s in each])
def test_every_setting_learns(variant, settings, battery):
    """By the end of a run: a tier that has just been switched on is noise at first, and a mask that comes in hides
    what was learned. What the start would give is not counted."""
    _, reports = battery.train(battery.quick(variant, **settings))
    assert float(reports[-1].measured["explained_variance"]) > float(reports[0].measured["explained_variance"])


REFUSED = [
    ("tiered", {"tier_fractions": (0.5, 0.5, 1.0)}, "tier_fractions: expected rising shares of the dictionary"),
    ("tiered", {"boundaries": tuple(range(1, 98)), "tier_weights": (1.0,) * 97}, "rising numbers, the last --width 96"),
    ("tiered", {"tier_weights": (0.5, 0.5)}, "tier_weights: expected 3"),
    ("tiered", {"tier_weights": (-1.0, 1.0, 1.0)}, "tier_weights: expected 0 or more"),
    ("tiered", {"tier_weights": (0.0, 0.0, 1.0)}, "to learn from"),
    ("tiered", {"composition_weight": -0.1}, "composition_weight: expected 0 or more"),
    ("tiered", {"curriculum": (0.2, 0.1, 0.4)}, "curriculum: expected 3"),
    (
        "tiered",
        {"importance": "fixed", "tier_weights": (0.0, 0.4, 0.6), "curriculum": (0.0, 0.1, 0.2)},
        "more than 0 for the tier that starts the curriculum",
    ),
    ("tiered", {"curriculum": (0.0, -0.5, 0.4)}, "the first 0, no other below it"),
    ("tiered", {"moves_live": True}, "moves_live: expected moves_every_steps"),
    ("tiered", {"moves_at_once": 0.0}, "moves_at_once: expected more than 0 and at most 1"),
    ("tiered", {"moves_at_once": 5.0}, "moves_at_once: expected more than 0 and at most 1"),
    ("tiered", {"base": "matryoshka"}, "a single reconstruction"),
    ("tiered", {"base": "crosscoder"}, "found 'crosscoder'"),
    ("positional", {"base": "temporal"}, "wraps no other"),
    ("positional", {"ranges": 0}, "ranges: expected 1"),
    ("positional", {"masked_share": 0.0}, "masked_share: expected more than 0"),
    ("positional", {"masked_share": 0.001}, "masked_share: expected a share of the 96 latents that is at least one"),
    (
        "positional",
        {"range_encoders": True, "range_encoder_share": 0.001, "independent_encoders": True, "init": "orthogonal"},
        "range_encoder_share: expected a share of the 96 latents that is at least one, found 0.001",
    ),
    ("positional", {"mask": "none"}, "mask=none does nothing"),
    ("positional", {"mask": "static_slicing", "progressive": (0.0, 0.5)}, "progressive: expected mask"),
    ("positional", {"progressive": (0.5, 0.5)}, "progressive: expected 0 <= begin"),
    ("positional", {"learned_coefficient": True}, "expected a progressive mask"),
    ("positional", {"position_embeddings": True}, "position_embeddings needs range_encoders"),
    ("positional", {"independent_encoders": True}, "independent_encoders needs range_encoders"),
    ("positional", {"norm_rectified": True}, "norm_rectified needs pre_norm"),
    ("positional", {"adapters_on": "features"}, "adapters_on needs adapters"),
    ("positional", {"adapters": True, "adapted_rate": 0.5}, "adapted_rate: expected adapter_from"),
    (
        "positional",
        {"base": "topk", "adapters": True, "adapter_from": (0.1, 0.2), "unadapted_penalty": 0.5},
        "unadapted_penalty: expected a base with an L1 penalty",
    ),
    ("positional", {"adapters": True, "adapter_lr_scale": -1.0}, "adapter_lr_scale: expected more than 0"),
    ("positional", {"context": None}, "context: expected the length"),
    ("positional", {"base": "topk", "l1_before_mask": True}, "a base with an L1 penalty"),
    ("temporal", {"temporal_weights": (0.1, -0.1, 0.1)}, "temporal_weights: expected 0 or more"),
    ("temporal", {"group_shares": (0.5, 0.5, 0.5)}, "group_shares: expected at most 1"),
    (
        "temporal",
        {"group_shares": (0.3, 0.001, 0.0)},
        "group_shares: expected a share of the 96 latents .* found 0.001",
    ),
    ("temporal", {"short_to": 20}, "expected rising lags"),
    ("temporal", {"buffer_std": 0.1}, "buffer_std: expected a buffer_mixing under 1"),
    ("temporal", {"buffer_mixing": 0.0}, "buffer_mixing: expected more than 0"),
    ("temporal", {"position_gate": True, "context": None}, "context: expected the length"),
    ("temporal", {"base": "abstopk", "prune_share": 0.1}, "prune_share: expected a base whose latents a negative bias"),
]


@pytest.mark.parametrize("variant, settings, message", REFUSED)
def test_what_cannot_be_is_refused_by_name(variant, settings, message, battery):
    with pytest.raises(ConfigInvalid, match=message):
        battery.config_of(variant, **settings).build(battery.D)


@pytest.mark.parametrize(
    "words, message",
    [
        (("positional", "positional.ranges=3"), "ranges: expected a number that divides the store's windows of 8"),
        (("positional", "positional.context=16"), "context: expected 8, the store's window length, found 16"),
        (
            ("temporal", "progressive_window=8"),
            "progressive_window: expected fewer tokens than the store's windows of 8",
        ),
        (("temporal", "long_to=100"), "long_to: expected lags that fit the store's windows of 8 tokens, found 100"),
    ],
)
def test_a_store_that_does_not_fit_is_refused_before_anything_is_written(words, message, written, cli, tmp_path):
    result = cli(
        *("--variant", words[0], "--set", words[1], "--set", "data.batch_tokens=64"),
        *("--layer", 3, "--cache", written["path"], "--epochs", 1),
    )
    assert result.exit_code == 1 and message in " ".join(result.output.split())
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    "variant, settings",
    [
        ("positional", {"mask": "soft", "pre_norm": True}),
        ("positional", {"mask": "none", "range_encoders": True, "adapters": True}),
        ("positional", {"adapters": True, "adapters_on": "features", "pre_norm": True, "norm_rectified": True}),
        ("temporal", {"position_gate": True}),
        ("tiered", {"tier_norm": True}),
        ("tiered", {}),
    ],
)
def test_what_was_saved_encodes_as_what_was_trained(variant, settings, battery, tmp_path):
    config = battery.quick(variant, **settings)
    trainee, _ = battery.train(config, 10)
    sae, batch = trainee.sae, battery.batches(config, 1)[0]
    save_sae(tmp_path, sae, trainee.assembly.input_stats, {}, to_json(config), variant, knobs={})
    loaded = load_sae(tmp_path)
    side = Side({name: value for name, value in batch.side.items() if name == "position"})
    with torch.no_grad():
        expected, found = sae.encode(batch.x, side), loaded.encode(batch.x, side)
        torch.testing.assert_close(loaded.decode(found), sae.decode(expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(found > 0, expected > 0)
    assert loaded.needs_side == (sae.needs_side if isinstance(sae, ShapedAutoencoder) else ())
    assert {name.partition(".")[0] for name in loaded.extras_tensors} == set(sae.extras)


def test_what_is_learned_is_written_down(battery):
    expected = {
        "tiered": {
            "tiers/activity_1",
            "tiers/size_3",
            "tiers/importance_2",
            "composition/r2_2",
            "composition/sparsity_3",
        },
        "positional": {"mask/coefficient", "mask/retention"},
        "temporal": {
            "temporal/weight_short",
            "temporal/weight_long",
            "temporal/activation_variance",
            "temporal/lifetime",
            "temporal/pruned",
        },
    }
    for variant, names in expected.items():
        _, reports = battery.train(battery.quick(variant), 2)
        assert names <= reports[-1].scalars().keys()
        json.dumps(reports[-1].scalars())


def test_configs_are_found_by_their_files():
    for variant in OFF:
        assert config_type(variant)().needs().inputs == (19,)
