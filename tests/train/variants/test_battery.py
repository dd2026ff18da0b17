"""What every file in train/variants/ must do. A new variant is found by its file and needs no edit here."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from itertools import count, product

import pytest
import torch

from saemill.cache_schema.strict_json import StrictError, flatten, from_json, to_json
from saemill.train.config.parse_settings import with_settings
from saemill.train.config.run_config import RunRequest
from saemill.train.data.scaling import joined_stats, unit_stats
from saemill.train.disk.sae_lens_folder import read_sae, save_sae
from saemill.train.engine.step import Trainee
from saemill.train.engine.terms_and_constraints import Assembly
from saemill.train.errors import ConfigInvalid, NonFiniteLoss, StateInvalid
from saemill.train.kit.variant_registry import config_type, names
from saemill.train.run.find_and_load_sae import rebuild
from saemill.train.sae.kernels import dense_products
from saemill.train.sae.side_inputs import Side

VARIANTS = names()
LEARNING = [name for name in VARIANTS if not config_type(name).is_baseline]


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_survives_json(battery, variant):
    config = battery.config_of(variant)
    raw = json.loads(json.dumps(to_json(config)))
    assert from_json(config_type(variant), raw) == config
    with pytest.raises(StrictError, match="widht"):
        from_json(config_type(variant), raw | {"widht": 5})


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_defaults_build_a_request(battery, variant):
    needs = config_type(variant)().needs()
    assert needs.layers == tuple(sorted(needs.layers)) != ()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_share_a_weight_or_a_decay_out_of_its_bounds_is_refused(variant):
    wrong = {"_fraction": (2.0, -0.1), "_from": (2.0,), "_until": (2.0,), "_decay": (1.0, -0.1)}
    wrong |= dict.fromkeys(("_weight", "penalty"), (-1.0,))
    numbers = [f.name for f in dataclasses.fields(config_type(variant)) if f.type in ("float", "float | None")]
    for name, value in (
        (name, value)
        for name in numbers
        for end in wrong
        if name.endswith(end) and not name.startswith("half_life")
        for value in wrong[end]
    ):
        with pytest.raises(ConfigInvalid, match=f"{name}: expected .*, found {value}"):
            RunRequest.of_variants([variant], {name: value}).members(lambda _: {})


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes(battery, variant):
    config = battery.config_of(variant)
    assembly: Assembly = config.build(battery.D)
    batch = battery.batches(config, 1)[0]
    target = batch.x if batch.target is None else batch.target
    side = battery.side_for(assembly, batch)
    acts = assembly.sae.encode(batch.x, side)
    assert acts.shape == (battery.ROWS, 96)
    assert assembly.sae.decode(acts).shape == target.shape
    codes = assembly.sae.codes(batch.x, side)
    assert codes.dense().shape == acts.shape
    x_hat = assembly.sae.reconstruct(codes, side)
    assert x_hat.shape == target.shape
    torch.testing.assert_close(x_hat, assembly.sae.decode(codes.dense()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_rows_in_half_precision_is_encoded_and_rebuilt(battery, variant):
    config = battery.config_of(variant)
    batch, sae = battery.batches(config, 1)[0], config.build(battery.D).sae
    target = batch.x if batch.target is None else batch.target
    for rows, dtype in product((0, 3), (torch.float32, torch.bfloat16)):
        side = Side({name: batch.side[name][:rows] for name in sae.needs_side})
        x = batch.x[:rows].to(dtype)
        acts = sae.encode(x, side)
        x_hat = sae.skip(x, sae.decode(acts))
        assert acts.shape == (rows, 96) and x_hat.shape == (rows, target.shape[1])
        assert acts.dtype == x_hat.dtype == torch.float32


@pytest.mark.parametrize("variant", [name for name in VARIANTS if hasattr(config_type(name)(), "encoder_product")])
def test_a_saved_sae_has_the_same_codes_on_every_processor(battery, variant, monkeypatch):
    """Training may choose in bfloat16 where there are units for it; `encode` does not."""
    found = []
    for has_units in (False, True):
        monkeypatch.setattr(dense_products, "has_fast_bfloat16", lambda device_type, has_units=has_units: has_units)
        config = battery.config_of(variant, encoder_product="bfloat16")
        batch, sae = battery.batches(config, 1)[0], config.build(battery.D).sae
        found.append(sae.encode(batch.x, Side({name: batch.side[name] for name in sae.needs_side})))
    assert torch.equal(*found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_a_finite_loss(battery, variant):
    """The first SAE is measured as the last step would see it: k, masks and the like may change on the way."""
    maps = battery.config_of(variant).needs().targets is not None
    config = battery.quick(variant, start="drawn" if maps else "fitted")  # fitted rows know a small first batch best
    _, reports = battery.train(config)
    assert all(torch.isfinite(report.measured["loss"]) for report in reports)
    early, batches = Trainee("one", config.build(battery.D), battery.STEPS), battery.batches(config, battery.STEPS)
    if variant in LEARNING:  # the first step of others is all of their training
        early.step(batches[0])
    early.step_index = battery.STEPS - 1
    before, after = (float(one.measured["loss/reconstruction"]) for one in (early.step(batches[-1]), reports[-1]))
    assert after < before, f"reconstruction on the last batch: {before:.4g} after one step, {after:.4g} after all"
    scalars = reports[-1].scalars()
    terms = {name.removeprefix("loss/"): value for name, value in scalars.items() if name.startswith("loss/")}
    weighted = sum(value * scalars[f"weight/{name}"] for name, value in terms.items())
    assert scalars["loss"] == pytest.approx(weighted, rel=1e-5)


@pytest.mark.parametrize("variant", LEARNING)
def test_gradient_reaches_every_parameter(battery, variant):
    config = battery.quick(variant)
    trainee = Trainee("one", config.build(battery.D), battery.STEPS)
    trainee.step_index = battery.STEPS // 2
    before = {name: parameter.detach().clone() for name, parameter in trainee.sae.named_parameters()}
    for batch in battery.batches(config, 3):
        trainee.step(batch)
    unmoved = [name for name, parameter in trainee.sae.named_parameters() if torch.equal(before[name], parameter)]
    assert not unmoved


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_seed_same_bits_and_another_seed_others(battery, variant):
    first, second = (battery.train(battery.quick(variant, seed=5), 5)[0].state() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = battery.train(battery.quick(variant, seed=6), 5)[0].state()
    if variant in LEARNING:
        assert not torch.equal(first["sae.W_dec"], other["sae.W_dec"])


@pytest.mark.parametrize("variant", [name for name in VARIANTS if config_type(name)().unread()])
def test_a_setting_that_is_called_unread_changes_no_bit(battery, variant):
    config = battery.quick(variant)
    others = {name: _another(name, flatten(to_json(config))[name]) for name in config.unread()}
    first, second = (battery.train(one, 5)[0].state() for one in (config, with_settings(config, others, variant)))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def _another(name, value):
    if name == "adapter_from":
        return [0.1, 0.3]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 0.9 * (value or 1.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopping_and_going_on_changes_no_bit(battery, variant):
    assert battery.changed_by_resuming(battery.quick(variant, start="fitted"), 10) == []


def _centrings():
    """Every variant, and those that can be centred by the mean both ways."""
    for variant in VARIANTS:
        config = config_type(variant)()
        can_choose = hasattr(config, "centre_by_mean") and "centre_by_mean" not in config.unread()
        yield from ((variant, {"centre_by_mean": one}) for one in (False, True)) if can_choose else [(variant, {})]


@pytest.mark.parametrize(("variant", "changes"), list(_centrings()))
def test_a_saved_sae_has_the_codes_that_were_trained(battery, variant, changes, tmp_path):
    config = battery.quick(variant, **changes)
    unit, generator, number = unit_stats(battery.D), torch.Generator().manual_seed(4), count(1)

    def of_a_layer():
        mean = torch.randn(battery.D, generator=generator)
        return dataclasses.replace(unit, mean=mean, scale=unit.scale * 0.37 * next(number))

    places = filter(None, (config.needs().inputs, config.needs().targets))
    stats = [joined_stats([of_a_layer() for _ in layers]) for layers in places]
    assembly = config.build(battery.D, *stats)
    trainee, _ = battery.train(config, 5, Trainee("one", assembly, battery.STEPS))
    knobs = assembly.knobs_at(battery.STEPS // 2, battery.STEPS)
    save_sae(tmp_path, trainee.sae, stats[0], {}, to_json(config), variant, stats[-1], knobs)
    loaded, (batch,) = read_sae(tmp_path, rebuild), battery.batches(config, 1)
    with torch.no_grad():
        acts = trainee.sae.encode(batch.x, battery.side_for(assembly, batch))
        x_hat, raw = trainee.sae.decode(acts) / stats[-1].scale, batch.x / stats[0].scale
        found = loaded.encode(raw, Side(batch.side))
        forms = [(found, loaded.decode(found)), *([battery.official(tmp_path, raw)] if trainee.sae.is_plain else [])]
    for found, found_x_hat in forms:
        assert torch.equal(found.sign(), acts.sign()) and bool(acts.any())
        torch.testing.assert_close(found_x_hat, x_hat, rtol=1e-5, atol=1e-5 * float(x_hat.abs().amax()))
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(96))
    assert loaded.extras_tensors.keys() == trainee.sae.extras.state_dict().keys()
    assert loaded.needs_side == trainee.sae.needs_side


@cache
def train_topk(battery):
    return battery.train(battery.quick("topk", seed=2), 4)[0].state()


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_trained_side_by_side_have_the_bits_they_have_alone(battery, variant):
    configs = [battery.quick(variant, seed=1), battery.quick("topk", seed=2)]
    alone = battery.train(configs[0], 4)[0].state(), train_topk(battery)
    trainees = [Trainee("x", config.build(battery.D), battery.STEPS) for config in configs]
    for pair in zip(*(battery.batches(config, 4) for config in configs), strict=True):
        for trainee, batch in zip(trainees, pair, strict=True):
            trainee.step(batch)
    for expected, trainee in zip(alone, trainees, strict=True):
        assert all(torch.equal(tensor, trainee.state()[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loss_that_is_no_number_stops_before_the_weights_change(battery, variant):
    config = battery.quick(variant)
    trainee = Trainee("one", config.build(battery.D), battery.STEPS)
    batch = battery.batches(config, 1)[0]
    trainee.step(batch)
    before = {name: tensor.clone() for name, tensor in trainee.state().items()}
    batch.x[3] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"step 1: .*reconstruction = nan"):
        trainee.step(batch)
    after = trainee.state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_foreign_state_is_refused_whole(battery, variant):
    trainee = Trainee("one", battery.config_of(variant).build(battery.D), battery.STEPS)
    state = trainee.state()
    wrong = {name: tensor for name, tensor in state.items() if name != "step"} | {"sae.W_dec": torch.zeros(2, 2)}
    with pytest.raises(StateInvalid, match=r"sae.W_dec: expected shape \(96, \d+\), found \(2, 2\); step is missing"):
        trainee.load_state(wrong)


@pytest.mark.parametrize("variant", [name for name in LEARNING if config_type(name)().needs().inputs == (19,)])
def test_a_planted_dictionary_is_recovered(battery, variant, planted):
    if battery.config_of(variant).needs().targets is not None:
        pytest.skip("the dictionary is planted in one layer")
    # Penalties act in their own units in each variant; one of the two must fit this sparsity.
    penalties = [0.3, 0.8] if hasattr(battery.config_of(variant), "penalty") else [None]
    shares = []
    for penalty in penalties:
        chosen = {} if penalty is None else {"penalty": penalty}
        config = battery.quick(variant, lr=3e-3, k=3, target_l0=3.0, dead_after_tokens=20_000, start="fitted", **chosen)
        shares.append(battery.recovered(config, *planted))
        if shares[-1] >= battery.FOUND:
            break
    assert max(shares) >= battery.FOUND
