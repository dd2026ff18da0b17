"""Every variant begins where it rebuilds its first batch, however wide it is, and never falls below nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from saemill.train.config.recipe import runs_of, studies
from saemill.train.config.run_config import RunRequest
from saemill.train.data.batch import Batch
from saemill.train.data.scaling import Stats
from saemill.train.engine.first_weights_from_data import fit_start
from saemill.train.engine.step import Trainee
from saemill.train.kit.variant_registry import names
from saemill.train.parallel.sums_over_processes import ALONE

D = 32
MORE: dict[str, dict[str, Any]] = {
    "crosscoder": {"gate": "relu"},
    "attention": {"guidance": "encode"},
    "tiered": {"init": "xavier", "tier_norm": True, "curriculum": (0.0, 0.1, 0.2)},
    "positional": {"mask": "soft", "progressive": (0.1, 0.6), "pre_norm": True, "range_encoders": True},
    "temporal": {"position_gate": True, "base": "batchtopk"},
    "jumprelu": {"target_l0": 48.0},
}
CASES = [(name, {}) for name in names()] + list(MORE.items())


def fitted(battery: Any, variant: str, start: str = "fitted", **changes: Any) -> Trainee:
    config = battery.config_of(variant, **{"width": 16 * D, **changes})
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, start=start))
    return Trainee("one", config.build(D), battery.STEPS)


@pytest.mark.parametrize(("variant", "changes"), CASES)
def test_no_step_is_below_nothing(battery, variant, changes):
    trainee = fitted(battery, variant, **changes)
    config = battery.config_of(variant, **{"width": 16 * D, **changes})
    batches = battery.batches(config, 12)
    if config.needs().targets is not None:  # another layer has much of this one
        batches = [dataclasses.replace(batch, target=batch.x + 0.5 * batch.target) for batch in batches]
    found = [float(trainee.step(batch).measured["explained_variance"]) for batch in batches]
    assert min(found) >= 0.0
    assert found[0] > (0.3 if batches[0].target is None else 0.2) or variant == "pca"


@pytest.mark.parametrize("study", studies())
def test_no_sae_of_a_recipe_is_below_nothing(battery, study):
    """At its own settings, each once; controls differ in whose attention they read."""
    seen: list[Any] = []
    for recipe in runs_of(study):
        for member in RunRequest.of_recipe(recipe, {"width": 16 * D}).members(lambda _: {}):
            config: Any = member.config
            config = dataclasses.replace(config, context=36) if hasattr(config, "context") else config
            if config in seen or getattr(config, "shuffle_attention", False):
                continue
            seen.append(config)
            trainee = Trainee(member.label, config.build(D), 20)
            reports = [trainee.step(batch) for batch in battery.batches(config, 3, rows=256)]
            found = [float(report.measured["explained_variance"]) for report in reports]
            assert min(found) >= 0.0, (recipe.name, member.label, found)


@pytest.mark.parametrize("variant", ["standard", "topk", "gated", "transcoder"])
def test_rows_keep_their_length_and_pre_activations_are_lowered(battery, variant):
    trainee = fitted(battery, variant)
    before = {name: tensor.detach().clone() for name, tensor in trainee.sae.named_parameters()}
    (batch,) = battery.batches(battery.config_of(variant, width=16 * D), 1)
    batch = batch if batch.target is None else dataclasses.replace(batch, target=batch.x)
    fit_start(trainee.assembly, batch, battery.STEPS, ALONE)
    assert torch.equal(trainee.sae.W_enc, before["W_enc"])
    lowered = before["b_enc"] - trainee.sae.b_enc.detach()
    torch.testing.assert_close(lowered, lowered[:1].expand(len(lowered)))
    assert lowered[0] > 0.1
    y = (trainee.sae.reconstruct(trainee.sae.codes(batch.x)) - trainee.sae.b_dec).detach()
    target = batch.x - trainee.sae.b_dec.detach()
    assert float((y * target).sum() / y.square().sum()) == pytest.approx(1.0, abs=0.02)  # of least squares


@pytest.mark.parametrize("variant", ["transcoder", "skip_transcoder", "clt"])
def test_rows_of_what_maps_begin_where_the_target_is_when_their_latents_fire(battery, variant):
    """The target is a turned copy of the input: rows as drawn say nothing of it."""
    explained = {}
    for start in ("drawn", "fitted"):
        trainee = fitted(battery, variant, start)
        (batch,) = battery.batches(battery.config_of(variant, width=16 * D), 1)
        turned = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3)))[0]
        batch = dataclasses.replace(batch, target=(batch.x.unflatten(1, (-1, D)) @ turned).flatten(1))
        explained[start] = float(trainee.step(batch).measured["explained_variance"])
        W_dec = trainee.sae.W_dec.detach()
        assert torch.equal(trainee.sae.clear_unwritten(W_dec.clone()), W_dec)
        torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(16 * D))
    assert explained["drawn"] < 0.05 and explained["fitted"] > 0.25


def test_where_no_scale_rebuilds_the_target_the_start_stays_as_drawn(battery):
    """Lowering would go on until no latent fires."""
    trainee = fitted(battery, "transcoder")
    before = {name: tensor.detach().clone() for name, tensor in trainee.sae.named_parameters()}
    (batch,) = battery.batches(battery.config_of("transcoder", width=16 * D), 1)
    batch = dataclasses.replace(batch, target=torch.zeros_like(batch.x))  # there is nothing to rebuild
    fit_start(trainee.assembly, batch, battery.STEPS, ALONE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainee.sae.named_parameters())
    assert float(trainee.sae.codes(batch.x).l0) == pytest.approx(battery.config_of("transcoder").k)


def test_a_start_as_drawn_changes_nothing(battery):
    trainee = fitted(battery, "standard", "drawn")
    (batch,) = battery.batches(battery.config_of("standard", width=16 * D), 1)
    x_hat = trainee.sae(batch.x).detach()
    expected = 1 - (batch.x - x_hat).square().sum() / len(batch.x) / D
    assert float(trainee.step(batch).measured["explained_variance"]) == pytest.approx(float(expected), rel=1e-4)


def test_a_transcoders_bias_begins_at_the_mean_of_its_target_or_at_zero(battery):
    config, target = battery.config_of("transcoder"), Stats(torch.ones(D), torch.arange(float(D)), float(D))
    mean, zero = (
        dataclasses.replace(config, decoder_bias=bias).build(D, None, target).sae.b_dec for bias in ("mean", "zero")
    )
    assert torch.equal(mean, target.mean) and not zero.any()


def test_jumprelu_begins_and_ends_at_the_l0_it_was_asked_for(battery, planted):
    """As many as rows are made of: where more would rebuild much better, the penalty gives way to them."""
    rows, _ = planted
    generator = torch.Generator().manual_seed(0)
    trainee = Trainee("one", battery.config_of("jumprelu", target_l0=3.0, width=8 * D).build(D), 150)
    drawn = (rows[torch.randint(len(rows), (512,), generator=generator)] for _ in range(150))
    found = [float(trainee.step(Batch(x)).measured["l0"]) for x in drawn]
    assert found[0] == pytest.approx(3.0, rel=0.02)
    assert float((trainee.sae.encode(rows) > 0).sum(1).double().mean()) == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("variant", ["topk", "batchtopk", "matryoshka"])
def test_the_asked_number_fires_where_few_rows_have_most_of_the_squares(battery, variant):
    """What rebuilds a few large rows best would leave all others silent, and then dead."""
    trainee = fitted(battery, variant, k=8)
    for batch in battery.batches(battery.config_of(variant, width=16 * D, k=8), 3):
        x = batch.x * torch.where(torch.arange(len(batch.x)) % 64 == 0, 8.0, 0.9)[:, None]
        report = trainee.step(dataclasses.replace(batch, x=x))
        assert float(report.measured["l0"]) > 0.95 * 8
        assert float(report.measured["explained_variance"]) >= 0.0
