"""The encoder's input is centred by the activations' mean while training; runs and SAEs of before were not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from saemill.cache_schema.strict_json import to_json
from saemill.train.data.scaling import unit_stats
from saemill.train.disk.sae_folder import read_sae, save_sae
from saemill.train.engine.step import Trainee
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


def test_a_run_of_before_goes_on_as_it_began(battery, stats):
    """Its checkpoint has no mean, and its configuration does not say how it was centred."""
    old, new = (battery.quick("topk", centre_by_mean=by_mean) for by_mean in (False, True))
    straight, _ = battery.train(old, 6, Trainee("one", old.build(battery.D, stats), battery.STEPS))
    stopped, _ = battery.train(old, 3, Trainee("one", old.build(battery.D, stats), battery.STEPS))
    resumed = Trainee("one", new.build(battery.D, stats), battery.STEPS)
    resumed.load_state({name: tensor.clone() for name, tensor in stopped.state().items()})
    battery.train(old, 3, resumed, start=3)
    expected, found = straight.state(), resumed.state()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_sae_of_before_opens_with_the_codes_it_had(battery, stats, tmp_path):
    """One with masks, whose saved settings name a base and not how its input was centred."""
    config = battery.quick("hierarchical", base="topk")
    trainee = Trainee("one", config.build(battery.D, stats), battery.STEPS)
    trainee.sae.input_mean = None
    battery.train(config, 5, trainee)
    save_sae(tmp_path, trainee.sae, stats, {}, to_json(config), "hierarchical", stats, {})
    (batch,) = battery.batches(config, 1)
    side = battery.side_for(trainee.assembly, batch)
    expected, found = trainee.sae.encode(batch.x, side), read_sae(tmp_path, rebuild).encode(batch.x, side)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
