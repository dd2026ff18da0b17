"""The encoder's input is centred by the activations' mean while training; runs and SAEs of before were not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from saemill.cache_schema.strict_json import to_json
from saemill.train.data.scaling import unit_stats
from saemill.train.disk.sae_lens_folder import CONFIG, read_sae, save_sae
from saemill.train.engine.step import Trainee
from saemill.train.kit.variant_registry import read_settings
from saemill.train.run.find_and_load_sae import rebuild


@pytest.fixture
def stats(battery, rng):
    return dataclasses.replace(unit_stats(battery.D), mean=torch.randn(battery.D, generator=rng))


def test_the_decoder_bias_has_no_gradient_through_the_encoder(battery, stats):
    found = []
    for by_mean in (True, False):
        config = battery.quick("topk", centre_by_mean=by_mean)
        trainee = Trainee("one", config.build(battery.D, stats), battery.STEPS)
        view = battery.view_of(trainee, battery.batches(config, 1)[0])
        torch.autograd.backward(view.x_hat.sum())
        gradient = trainee.sae.b_dec.grad
        assert gradient is not None
        found.append(torch.equal(gradient, torch.full_like(gradient, len(view.x))))
    assert found == [True, False]


@pytest.mark.parametrize(("base", "by_mean", "expected"), [("topk", None, True), ("topk", False, False)])
def test_a_variant_on_a_base_has_the_centre_of_its_base_or_the_one_asked_for(battery, stats, base, by_mean, expected):
    config = battery.quick("hierarchical", base=base, centre_by_mean=by_mean)
    assert (config.build(battery.D, stats).sae.input_mean is not None) == expected


@pytest.mark.parametrize("variant", ["topk", "hierarchical", "transcoder"])
def test_settings_of_before_have_no_mean(variant):
    assert read_settings(variant, {}, "here").centre_by_mean is False
    assert read_settings(variant, {"centre_by_mean": True}, "here").centre_by_mean is True


def test_an_sae_of_before_opens_with_the_codes_it_had(battery, stats, tmp_path):
    """One with masks, whose saved settings name a base and not how its input was centred."""
    config = battery.quick("hierarchical", base="topk", centre_by_mean=False)
    trainee, _ = battery.train(config, 5, Trainee("one", config.build(battery.D, stats), battery.STEPS))
    settings = {name: value for name, value in to_json(config).items() if name != "centre_by_mean"}
    save_sae(tmp_path, trainee.sae, stats, {}, settings, "hierarchical", stats, {})
    assert "centre_by_mean" not in (tmp_path / CONFIG).read_text()
    (batch,) = battery.batches(config, 1)
    side = battery.side_for(trainee.assembly, batch)
    expected, found = trainee.sae.encode(batch.x, side), read_sae(tmp_path, rebuild).encode(batch.x, side)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
