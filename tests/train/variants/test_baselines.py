"""Sanity baselines hold still what they say they hold still, and principal components are principal components."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from saemill.train.config.recipe import find_recipes
from saemill.train.config.run_config import RunRequest
from saemill.train.config.sanity_baselines import with_baselines
from saemill.train.data.batch import Batch
from saemill.train.engine.step import Trainee
from saemill.train.errors import ConfigInvalid

STILL = {"decoder": "W_dec", "encoder": "W_enc"}


def trained(battery, config, steps=30):
    trainee = Trainee("one", config.build(battery.D), battery.STEPS)
    before = {name: tensor.clone() for name, tensor in trainee.sae.state_dict().items()}
    battery.train(config, steps, trainee)
    return before, trainee.sae


@pytest.mark.parametrize("base", ["topk", "standard", "gated", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("part", STILL)
def test_one_half_stays_as_it_was_drawn_and_the_other_learns(battery, base, part):
    before, sae = trained(battery, battery.quick("frozen", lr=1e-2, base=base, part=part))
    other = ({"W_enc", "W_dec"} - {STILL[part]}).pop()
    torch.testing.assert_close(sae.get_parameter(STILL[part]), before[STILL[part]], atol=1e-5, rtol=0)
    assert float((sae.get_parameter(other) - before[other]).detach().norm()) > 0.1 * float(before[other].norm())


def test_a_soft_frozen_decoder_turns_as_far_as_it_may_and_no_further(battery):
    before, sae = trained(battery, battery.quick("frozen", lr=0.1, part="soft_decoder", cosine=0.8))
    W_dec = sae.W_dec.detach()
    cosine = torch.linalg.vecdot(W_dec, before["W_dec"])
    assert cosine.min() == pytest.approx(0.8, abs=1e-5)
    assert (cosine > 0.8 - 1e-5).all()
    torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(len(W_dec)))


@pytest.mark.parametrize("part", STILL)
def test_weight_decay_moves_nothing_that_is_frozen(battery, part):
    config = battery.quick("frozen", lr=1e-2, part=part)
    before, sae = trained(
        battery, dataclasses.replace(config, optim=dataclasses.replace(config.optim, weight_decay=0.1))
    )
    torch.testing.assert_close(sae.get_parameter(STILL[part]), before[STILL[part]], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("part", "other"), [("decoder", "W_enc"), ("encoder", "W_dec"), ("soft_decoder", "W_enc")])
def test_what_is_not_frozen_decays_as_the_bases_does(battery, part, other):
    optim = dataclasses.replace(battery.quick("topk", lr=1e-2).optim, weight_decay=0.5)
    configs = (battery.config_of("topk"), battery.config_of("frozen", part=part, encoder_product="bfloat16"))
    base, sae = (trained(battery, dataclasses.replace(config, optim=optim), 1)[1] for config in configs)
    assert torch.equal(sae.get_parameter(other), base.get_parameter(other))


@pytest.mark.parametrize(
    ("variant", "settings", "message"),
    [
        ("pca", {"optim.lr": 0.1}, "optim.lr 0.1 would be ignored: nothing is learned by gradient"),
        ("frozen", {"cosine": 0.5}, "cosine 0.5 would be ignored: only part=soft_decoder reads it"),
    ],
)
def test_a_setting_that_a_baseline_does_not_read_is_refused(variant, settings, message):
    with pytest.raises(ConfigInvalid, match=message):
        RunRequest.of_variants([variant], settings).members(lambda _: {})
    beside = RunRequest.of_variants(["topk", variant], {"optim.lr": 0.1}).members(lambda _: {})
    assert {member.config.optim.lr for member in beside} == {0.1}


@pytest.mark.parametrize(("base", "number"), [("topk", "k"), ("batchtopk", "k"), ("jumprelu", "asked_l0")])
@pytest.mark.parametrize("settings", [{}, {"k": 5, "target_l0": 5.0}])
def test_every_baseline_has_the_number_of_active_latents_that_its_sae_is_built_with(battery, base, number, settings):
    chosen = {name: value for name, value in settings.items() if hasattr(battery.config_of(base), name)}
    most = battery.D // 4

    def limits(_: Any) -> dict[str, float]:
        return {"width": 64, "k": most, "target_l0": most}

    members = RunRequest.of_variants(["attention"], {"attention.base": base} | chosen).members(limits)
    *saes, pca = with_baselines(members, limits)
    found = [getattr(member.config.build(battery.D).sae.gate, number) for member in saes]
    assert pca.variant == "pca" and found == [pca.config.k] * 4 == [5 if settings else most] * 4


def test_a_cosine_that_is_none_is_refused(battery):
    with pytest.raises(ConfigInvalid, match=r"cosine: expected a number from -1 to 1, found 1\.5"):
        battery.config_of("frozen", part="soft_decoder", cosine=1.5).needs()


def test_pca_rebuilds_as_principal_components_do(battery):
    """Rows of four directions of falling variance: two components explain what the two largest do."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.zeros(battery.D)
    scales[:4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    turned = torch.linalg.qr(torch.randn(battery.D, battery.D, generator=generator)).Q
    rows = (torch.randn(8 * battery.ROWS, battery.D, generator=generator) * scales) @ turned
    trainee = Trainee("one", battery.quick("pca", k=2).build(battery.D), 8)
    for part in rows.split(battery.ROWS):
        trainee.step(Batch(part))
    sae = trainee.sae
    components = torch.linalg.svd(rows, full_matrices=False).Vh
    assert float((sae.W_dec[:8:2].detach() * components[:4]).sum(1).abs().min()) > 0.999
    acts = sae.encode(rows)
    assert int((acts > 0).sum(1).max()) == 2
    largest = rows @ components.T
    kept = largest.square().topk(2, dim=1).values.sum(1)
    torch.testing.assert_close(sae.decode(acts).square().sum(1), kept, rtol=1e-3, atol=1e-3)


def test_of_a_run_that_compares_only_the_base_has_baselines(battery):
    """Others would be in no rule, and some of the literature's cannot be frozen. One without any may be there."""
    (recipe,) = find_recipes("temporal/decisive")

    def limits(_: Any) -> dict[str, float]:
        return {"width": 64}

    made = RunRequest.of_recipe(recipe, {"k": 8}, [{"seed": 0}, {"seed": 1}]).members(limits)
    labels = [member.label for member in with_baselines(made, limits, recipe)][len(made) :]
    assert len(labels) == 7 and all(label.startswith(("base_seed", "pca_k8")) for label in labels)
    stray = dataclasses.replace(made[0], label="stray", config=battery.config_of("pca", k=8))
    assert [one.label for one in with_baselines([*made, stray], limits, recipe)][len(made) + 1 :] == labels
