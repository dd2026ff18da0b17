"""Temporal losses against slow oracles and finite differences; lifetimes, variances, retired latents."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from saemill.train.kit.variant_registry import config_type, names
from saemill.train.sae import gates
from saemill.train.sae.extra_modules import retired_of
from saemill.train.sae.gates import AbsTopK, JumpRelu, Relu, TopK
from saemill.train.sae.side_inputs import Side
from saemill.train.terms import temporal
from saemill.train.terms.temporal import (
    Consistency,
    Dynamics,
    gradient_ratio,
    inconsistency,
    mean_lifetime,
    part_of,
    past_rows,
    remembered,
)

START, STOP = 4, 13
TOKENS = config_type("topk")().needs()
BASES = [  # but the one whose latents no bias keeps closed
    name
    for name in names()
    if config_type(name)().needs() == TOKENS and not config_type(name).is_baseline and name != "abstopk"
    if not hasattr(config_type(name), "base")
]


@pytest.fixture(params=["sparse", "dense"])
def sae(request, rng, shaping):
    made = shaping.make_sae(rng, TopK(5) if request.param == "sparse" else Relu())
    made.extras["temporal"] = Dynamics((START, STOP - START, 0, shaping.LATENTS - STOP)).double()
    return made


def weights(rng, count=STOP - START):
    return 0.5 + torch.rand(count, generator=rng, dtype=torch.float64)


def oracle_past(acts, side, mixing, length):
    """[B, F]: each row's running mean over the rows of its piece and document, from the definition."""
    out = torch.zeros_like(acts)
    for row, (window, position) in enumerate(zip(side["window"].tolist(), side["position"].tolist(), strict=True)):
        total, norm = torch.zeros_like(acts[0]), 0.0
        for age in range(position + 1):
            other = int(side["row_of"][window, position - age])
            is_same = (position - age) // length == position // length and side["document"][other] == side["document"][
                row
            ]
            if other >= 0 and is_same:
                total, norm = total + mixing * (1 - mixing) ** age * acts[other], norm + mixing * (1 - mixing) ** age
        out[row] = total / norm
    return out


def oracle(view, weight, lag, mixing=1.0, length=12):
    acts = view.codes.dense()[:, START:STOP]
    past, side, terms = oracle_past(acts.detach(), view.side, mixing, length), view.side, []
    for row, (window, position) in enumerate(zip(side["window"].tolist(), side["position"].tolist(), strict=True)):
        before = position - lag
        other = int(side["row_of"][window, before]) if before >= 0 and before // length == position // length else -1
        if other < 0 or side["document"][other] != side["document"][row]:
            continue
        a, b = acts[row] * weight.sqrt(), past[other] * weight.sqrt()
        if a.any() and b.any():
            terms.append(1 - a @ b / (a.norm() * b.norm()))
        elif a.any() or b.any():
            terms.append(a.new_ones(()))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("lag", [1, 3, 7])
@pytest.mark.parametrize("mixing", [1.0, 0.4])
@pytest.mark.parametrize("length", [12, 5])
def test_inconsistency_is_what_its_definition_says(lag, mixing, length, sae, rng, shaping):
    if lag >= length:
        pytest.skip("no pair in a piece")
    views, weight = shaping.make_views(rng, sae, temporal_window=float(length)), weights(rng)
    one, other = views(), views()
    found = inconsistency(one, part_of(one.codes, START, STOP), weight, lag, mixing)
    expected = oracle(other, weight, lag, mixing, length)
    torch.testing.assert_close(found, expected)
    for name in ("W_enc", "b_enc", "b_dec"):
        parameter = sae.get_parameter(name)
        torch.testing.assert_close(
            torch.autograd.grad(found, parameter, retain_graph=True)[0],
            torch.autograd.grad(expected, parameter, retain_graph=True)[0],
        )


def test_slopes_where_the_past_stands_still(sae, rng, shaping, monkeypatch):
    views, weight = shaping.make_views(rng, sae), weights(rng)
    past = remembered(views().side, part_of(views().codes, START, STOP).dense().detach(), 1.0).clone()
    monkeypatch.setattr(temporal, "remembered", lambda *_: past)
    shaping.assert_slopes(
        lambda: inconsistency(view := views(), part_of(view.codes, START, STOP), weight, 2),
        sae,
        rng,
        ("W_enc", "b_enc", "b_dec"),
    )


def test_silence_says_nothing_and_sudden_silence_counts_one(sae, rng, shaping):
    sae.b_enc.data[START:STOP] = -100.0
    view = shaping.make_views(rng, sae)()
    assert float(inconsistency(view, part_of(view.codes, START, STOP), weights(rng), 1).detach()) == 0.0


def test_pairs_stay_in_their_window_and_document(rng, shaping):
    view = shaping.make_views(rng, shaping.make_sae(rng))()
    past = past_rows(view.side, 2)
    for row, before in enumerate(past.tolist()):
        if before >= 0:
            assert view.side["window"][row] == view.side["window"][before]
            assert view.side["position"][row] - view.side["position"][before] == 2
            assert view.side["document"][row] == view.side["document"][before]
    assert (past >= 0).any() and (past < 0).any()


def test_adaptive_weights_are_shares_of_reconstructions_gradient(sae, rng, shaping):
    view = shaping.make_views(rng, sae)()
    loss = inconsistency(view, part_of(view.codes, START, STOP), weights(rng), 1)
    values = view.codes.values
    share = (view.x - view.codes.decode(sae.W_dec, sae.b_dec)).square().sum() / len(view.x) / view.stats.variance
    gradients = (torch.autograd.grad(each, values, retain_graph=True)[0] for each in (loss, share))
    own, other = (gradient[values != 0].norm() for gradient in gradients)
    assert float(gradient_ratio(view, loss)) == pytest.approx(min(100.0, float(other / own)))


def test_silent_rows_do_not_switch_adaptive_weights_off(rng, shaping, monkeypatch):
    """And dense codes, most of which are zeros, have the ratio of sparse ones."""
    sae = shaping.make_sae(rng, Relu())
    sae.b_enc.data[START:STOP] -= 5.0
    views, weight, found = shaping.make_views(rng, sae), weights(rng), []
    for share in (0.0, 1.0):
        monkeypatch.setattr(gates, "DENSE_SHARE", share)
        view = views()
        assert (view.codes.support is None) == (share == 0.0)
        is_silent = ~view.codes.dense()[:, START:STOP].any(dim=1)
        assert 0.1 < is_silent.double().mean() < 0.9
        loss = inconsistency(view, part_of(view.codes, START, STOP), weight, 1)
        assert float(torch.autograd.grad(loss, view.codes.values, retain_graph=True)[0].abs().max()) < 10.0
        found.append(float(gradient_ratio(view, loss)))
    assert found[0] == pytest.approx(found[1]) and found[0] > 1e-2


def test_silent_rows_leave_thresholds_alone(rng, shaping):
    """Entries just below a threshold are zero, and yet pass a gradient to it."""
    sae = shaping.make_sae(rng, JumpRelu(shaping.LATENTS, 6.0, 4.0).double())
    view = shaping.make_views(rng, sae)()
    is_silent = ~view.codes.dense()[:, START:STOP].any(dim=1)
    assert 0.1 < is_silent.double().mean() < 0.9
    loss = inconsistency(view, part_of(view.codes, START, STOP), weights(rng), 1)
    assert 0 < float(torch.autograd.grad(loss, sae.gate.raw_threshold)[0].abs().max()) < 10.0


def test_a_scale_draws_its_lags_from_its_range(sae, rng, shaping, monkeypatch):
    seen = set()
    monkeypatch.setattr(temporal, "past_rows", lambda side, lag: seen.add(lag) or past_rows(side, lag))
    for _ in range(60):
        Consistency("short", 2, 5, START, STOP)(shaping.make_views(rng, sae)())
    assert seen == {2, 3, 4, 5}


@pytest.mark.parametrize("is_signed", [False, True])
def test_lifetime_is_the_mean_length_of_active_stretches(is_signed, sae, rng, shaping):
    view = shaping.make_views(rng, shaping.make_sae(rng, AbsTopK(5)) if is_signed else sae)()
    active, side, runs = view.codes.dense() != 0, view.side, []
    for window in range(shaping.WINDOWS):
        for latent in range(shaping.LATENTS):
            length, document = 0, -1
            for row in [*side["row_of"][window].tolist(), -1]:
                if length and row >= 0 and active[row, latent] and side["document"][row] != document:
                    runs, length = [*runs, length], 0
                if row >= 0 and active[row, latent]:
                    length, document = length + 1, int(side["document"][row])
                elif length:
                    runs, length = [*runs, length], 0
    assert float(mean_lifetime(view)) == pytest.approx(sum(runs) / len(runs))


def test_running_variance_begins_empty_and_is_of_the_activations(sae, rng, shaping):
    view = shaping.make_views(rng, sae)()
    dynamics = sae.extras["temporal"]
    assert torch.equal(dynamics.weights(True), torch.ones(shaping.LATENTS).double())
    dynamics.observe(view)
    expected = view.codes.dense().detach().var(0, correction=0)
    torch.testing.assert_close(dynamics.variance, expected)
    torch.testing.assert_close(dynamics.weights(True), 1 / (expected / expected.mean() + 0.01), rtol=1e-4, atol=1e-4)


def test_latents_under_the_floor_are_left_out(sae, shaping):
    dynamics = sae.extras["temporal"] = Dynamics((20,), floor=0.5).double()
    dynamics.steps.fill_(1)
    dynamics.square.copy_(torch.linspace(0, 2, 20))
    assert dynamics.weights(False).tolist() == [0.0] * 5 + [1.0] * 15


def test_retired_latents_stay_silent_and_are_logged(battery):
    config = battery.quick("temporal", prune_share=1.0, prune_from=0.25, prune_every_steps=4, aux_k=4)
    trainee, reports = battery.train(config)
    retired = trainee.sae.extras["temporal"].retired
    pruned = [float(report.measured["temporal/pruned"]) for report in reports]
    assert pruned[9] == 0 and 0 < pruned[-1] == int(retired.sum()) < 96
    acts = trainee.sae.encode(battery.batches(config, 1)[0].x)
    assert not acts[:, retired].any() and acts[:, ~retired].any()


@pytest.mark.parametrize("base", BASES)
def test_pruning_that_never_comes_is_none(battery, base):
    """Latents that the base leaves out of its auxiliary loss are no pruned ones."""
    found = []
    for share in (0.0, 0.5):
        config = battery.quick("temporal", base=base, prune_share=share, prune_from=1.0, prune_every_steps=1)
        found.append(battery.train(config, 5)[0].state())
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


@pytest.mark.parametrize("every", [1, 100])
def test_pruning_a_tree_keeps_what_its_auxiliary_loss_leaves_alone(battery, every):
    config = battery.quick("temporal", base="treesae", prune_share=0.5, prune_from=0.0, prune_every_steps=every)
    sae = battery.train(config, 5)[0].sae
    retired, below = sae.extras["temporal"].retired, sae.extras["tree"].below
    assert retired.any() == (every == 1) and sae.W_enc[~retired].any(dim=1).all() and not sae.W_enc[retired].any()
    assert torch.equal(retired_of(sae, {}), retired | below)


def test_who_is_retired_in_the_last_step_is_silent_too(battery):
    config = battery.quick("temporal", prune_share=1.0, prune_from=0.0, prune_every_steps=battery.STEPS)
    sae = battery.train(config)[0].sae
    retired = sae.extras["temporal"].retired
    assert retired.any() and not sae.W_enc[retired].any() and (sae.b_enc[retired] == -1.0).all()
    assert sae.W_enc[~retired].any(dim=1).all()


def test_the_control_compares_with_the_past_of_another_window(sae, rng, shaping):
    view = shaping.make_views(rng, sae)()
    side, lag = view.side, 2
    apart = temporal.rows_apart(side, lag)
    found = (apart >= 0) & (side["position"] >= lag)
    assert found.sum() > 5
    assert (side["window"][apart[found]] != side["window"][found]).all()
    assert torch.equal(side["position"][apart[found]], side["position"][found] - lag)
    weight, part = weights(rng), part_of(view.codes, START, STOP)
    own, control = (inconsistency(view, part, weight, lag, 1.0, is_apart) for is_apart in (False, True))
    assert control.isfinite() and float(own.detach()) != float(control.detach())


def test_the_control_needs_two_windows(battery):
    assert battery.config_of("temporal", other_windows=True).needs().least_windows == 2


def test_a_past_that_starts_at_random_is_the_recursion_begun_there_in_each_document(rng):
    """h = m f + (1 - m) h, from the same numbers in both documents of a window without holes."""
    place = torch.arange(10)
    side = Side({"window": place * 0, "position": place, "row_of": place[None], "document": (place >= 6).long()})
    acts, start = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((10, 3), (3,)))
    past, expected = start, []
    for row in range(10):
        past = 0.3 * acts[row] + 0.7 * (start if row == 6 else past)
        expected.append(past)
    torch.testing.assert_close(remembered(side, acts, 0.3, start), torch.stack(expected))


def test_random_starts_are_of_the_size_asked_for_and_the_sae_s_own(battery):
    """They change training, from the SAE's generator; none is drawn where none is asked for."""
    found = {}
    for std in (0.0, 0.1):
        config = battery.quick("temporal", buffer_mixing=0.5, buffer_std=std, idle_steps=0, warmup_steps=0)
        trainee, _ = battery.train(config, 3)
        found[std] = trainee.sae.W_enc.detach()
    assert not torch.equal(found[0.0], found[0.1])
    loss = Consistency("short", 1, 4, 0, 5000, mixing=0.5, start_std=0.1)
    view = SimpleNamespace(generator=torch.Generator().manual_seed(0), draw=lambda on_host: on_host())
    assert float(loss._start(view).std()) == pytest.approx(0.1, rel=0.05)
