"""Settings that have no effect because of another one: no bit changes, and the command refuses them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from saemill.cache_schema.strict_json import to_json
from saemill.train.config.parse_settings import with_settings
from saemill.train.config.run_config import RunRequest
from saemill.train.errors import ConfigInvalid

OF_TEMPORAL_LOSSES = {
    "adaptive": "variance",
    "half_life_fraction": 0.1,
    "buffer_mixing": 0.5,
    "other_windows": True,
    "progressive_window": 4,
    "variance_floor": 0.5,
    "idle_steps": 3,
    "warmup_steps": 2,
    "idle_max_fraction": 0.9,
}


@pytest.mark.parametrize(
    ("variant", "switches", "others"),
    [
        ("topk", {"aux_weight": 0.0}, {"aux_k": 3}),
        (
            "crosscoder",
            {"gate": "relu", "aux_weight": 0.0, "penalty": 0.0},
            {"aux_k": 3, "penalty_warmup_fraction": 1.0},
        ),
        ("standard", {"penalty": 0.0}, {"penalty_warmup_fraction": 1.0}),
        ("jumprelu", {"penalty": 0.0}, {"penalty_warmup_fraction": 1.0}),
        ("attention", {"base": "topk", "aux_weight": 0.0}, {"aux_k": 3}),
        ("attention", {"alpha": 0.0}, {"temperature": 0.5, "negatives": 3, "min_mass": 0.2, "shuffle_attention": True}),
        ("attention", {"alpha": 0.0, "guidance": "encode"}, {"alpha_warmup_fraction": 0.9, "temperature": 0.5}),
        ("hierarchical", {"alpha": 0.0}, {"beta": 2.0, "objective": "cross_entropy", "links": "nearest"}),
        ("attention", {"base": "matching_pursuit"}, {"centre_by_mean": True}),
        ("frozen", {"base": "matching_pursuit"}, {"centre_by_mean": True}),
        ("tiered", {"base": "topk", "tier_norm": True}, {"encoder_product": "bfloat16"}),
        ("positional", {"base": "topk", "pre_norm": True}, {"encoder_product": "bfloat16"}),
        ("positional", {"base": "topk", "range_encoders": True}, {"encoder_product": "bfloat16"}),
        ("positional", {"adapters": True, "adapters_on": "features"}, {"encoder_product": "bfloat16"}),
        ("temporal", {"temporal_weights": (0.0, 0.0, 0.0)}, OF_TEMPORAL_LOSSES),
        ("temporal", {"group_shares": (0.0, 0.0, 0.0)}, OF_TEMPORAL_LOSSES),
        ("temporal", {"idle_steps": 0, "warmup_steps": 0}, {"reconstruction_boost": 1.0}),
        ("temporal", {"idle_max_fraction": 0.0}, {"reconstruction_boost": 1.0}),
    ],
)
def test_a_setting_that_another_switches_off_changes_no_bit_and_is_refused(battery, variant, switches, others):
    config = battery.quick(variant, dead_after_tokens=600, **switches)
    assert set(others) <= set(config.unread())
    first, second = (battery.train(one, 5)[0].state() for one in (config, with_settings(config, others, variant)))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    for name, value in others.items():
        with pytest.raises(ConfigInvalid, match=f"{name} .* would be ignored: "):
            RunRequest.of_variants([variant], to_json(switches) | {name: value}).members(lambda _: {})


def test_a_warm_up_that_only_the_frequency_penalty_reads_is_read(battery):
    config = battery.quick("jumprelu", penalty=0.0, frequency_penalty=5.0)
    slow = dataclasses.replace(config, penalty_warmup_fraction=1.0)
    assert "penalty_warmup_fraction" not in config.unread()
    first, second = (battery.train(one, 5)[0].state() for one in (config, slow))
    assert not torch.equal(first["sae.gate.raw_threshold"], second["sae.gate.raw_threshold"])
