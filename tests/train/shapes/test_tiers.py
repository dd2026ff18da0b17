"""Losses of tiers and their composition against slow oracles and finite differences; moves of latents."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saemill.train.data import device_copies
from saemill.train.engine.step import Trainee
from saemill.train.sae.extra_modules import retired_of
from saemill.train.sae.gates import Relu, TopK
from saemill.train.sae.kernels import hardware
from saemill.train.terms.constraints import GradientNoise, NonNegative, TierGradients
from saemill.train.terms.move_idle_latents import Moves, Structure, changes, choose, reallocated, weighted_loss
from saemill.train.terms.tiers import (
    TIERS,
    Composition,
    TieredReconstruction,
    Tiers,
    composition_l1,
    composition_loss,
    importance_loss,
    switch_name,
    tier_losses,
)
from saemill.train.variants.tiered import Config

WEIGHTS = (0.2, 0.3, 0.5)
SIZES = (5, 7, 8)
EASY = {"importance": "fixed", "tier_weights": (0.4, 0.3, 0.3), "composition_weight": 0.0, "idle_frequency": 0.0}


@pytest.fixture(params=["sparse", "dense"])
def sae(request, rng, shaping):
    """Tiers whose latents lie scattered, as they do after moves."""
    made = shaping.make_sae(rng, TopK(6) if request.param == "sparse" else Relu())
    tiers = Tiers(SIZES, WEIGHTS, "fixed").double()
    tiers.membership.copy_(tiers.membership[torch.randperm(shaping.LATENTS, generator=rng)])
    made.extras["tiers"] = tiers
    made.extras["composition"] = Composition(SIZES).double()
    for table in made.extras["composition"].parameters():
        table.data.uniform_(0, 1, generator=rng)
    return made


def oracle_losses(view):
    """Latent by latent: the mean squared error of the latents up to each tier, over the variance."""
    acts, tier = view.codes.dense(), view.sae.extras["tiers"].membership
    losses = []
    for top in range(3):
        x_hat = view.sae.b_dec.expand_as(view.x)
        for latent in range(acts.shape[1]):
            if tier[latent] <= top:
                x_hat = x_hat + acts[:, latent, None] * view.sae.W_dec[latent]
        losses.append((view.x - x_hat).square().sum(1).mean() / view.stats.variance)
    return torch.stack(losses)


def test_each_tier_reconstructs_with_those_below(sae, rng, shaping):
    views = shaping.make_views(rng, sae)
    torch.testing.assert_close(tier_losses(views()), oracle_losses(views()))
    residual = views()
    tier_losses(residual)
    torch.testing.assert_close(residual.residual, residual.x - residual.x_hat.detach())


def test_the_sum_is_weighted_and_has_the_slopes_of_the_oracle(sae, rng, shaping):
    views = shaping.make_views(rng, sae)
    expected = (oracle_losses(views()) * torch.tensor(WEIGHTS)).sum()
    torch.testing.assert_close(TieredReconstruction()(views()), expected)
    shaping.assert_slopes(lambda: TieredReconstruction()(views()), sae, rng)


def test_scaling_bounds_each_tiers_loss_by_one_without_a_gradient_of_its_own(sae, rng, shaping):
    views = shaping.make_views(rng, sae)
    losses = oracle_losses(views())
    assert (losses > 1).any()
    scaled = (losses / losses.clamp_min(1) * torch.tensor(WEIGHTS)).sum()
    torch.testing.assert_close(TieredReconstruction(scaled=True)(views()), scaled)


def test_tiers_that_are_not_on_count_nothing(sae, rng, shaping):
    view = shaping.make_views(rng, sae, tier_2=0.0, tier_3=0.0)()
    torch.testing.assert_close(TieredReconstruction()(view), oracle_losses(view)[0])


def test_importance_learns_what_each_tier_leaves_and_sums_to_one(sae, rng, shaping):
    sae.extras["tiers"] = tiers = Tiers(SIZES, WEIGHTS, "learned").double()
    views = shaping.make_views(rng, sae)
    shaping.assert_slopes(lambda: importance_loss(views()), tiers, rng)
    optimiser = torch.optim.Adam(tiers.parameters(), 0.05, betas=(0.9, 0.9))
    for _ in range(400):
        optimiser.zero_grad()
        importance_loss(views()).backward()
        optimiser.step()
    losses = oracle_losses(views()).detach()
    torch.testing.assert_close(tiers.log_variance.detach(), losses.log(), rtol=1e-3, atol=1e-3)
    expected = torch.tensor(WEIGHTS) / losses
    torch.testing.assert_close(tiers.weights(torch.ones(3)), expected / expected.sum(), rtol=1e-3, atol=1e-3)
    assert sae.W_dec.grad is None


def test_uncertainty_starts_at_the_weights_and_is_not_normalised():
    tiers = Tiers(SIZES, WEIGHTS, "uncertainty")
    torch.testing.assert_close(tiers.weights(torch.tensor([1.0, 1.0, 0.0])), torch.tensor([0.2, 0.3, 0.0]))


def test_where_no_tier_with_a_weight_is_on_none_counts():
    tiers = Tiers(SIZES, (0.0, 0.0, 1.0), "fixed")
    assert tiers.weights(torch.tensor([1.0, 1.0, 0.0])).tolist() == [0.0, 0.0, 0.0]


def test_composition_is_the_distance_of_each_row_from_its_parts(sae, rng, shaping):
    views = shaping.make_views(rng, sae)
    tier, composition = sae.extras["tiers"].membership, sae.extras["composition"]
    errors, sums = [], []
    for top, C in ((1, composition.C2), (2, composition.C3)):
        own, below = ((tier == t).nonzero().view(-1).tolist() for t in (top, top - 1))
        left = [
            sae.W_dec[latent] - sum(C[i, j] * sae.W_dec[part] for j, part in enumerate(below))
            for i, latent in enumerate(own)
        ]
        errors.append(torch.stack([row.square().sum() for row in left]).mean())
        sums.append(C.sum() / len(own))
    torch.testing.assert_close(composition_loss(views()), torch.stack(errors).mean())
    torch.testing.assert_close(composition_l1(views()), torch.stack(sums).mean())
    shaping.assert_slopes(lambda: composition_loss(views()), sae, rng)
    shaping.assert_slopes(lambda: composition_l1(views()), sae, rng)


def test_no_composition_ever_falls_below_zero(sae):
    (above,) = (c for c in Config(width=12).build(4).constraints if isinstance(c, NonNegative))
    for name in ("C2", "C3"):
        getattr(sae.extras["composition"], name).data[1, 1] = -0.5
    above.after_step(sae)
    assert all(float(table.detach()[1, 1]) == 0.0 for table in sae.extras["composition"].parameters())


def test_entries_follow_latents_that_move(rng, shaping):
    composition = Composition((4, 4, 4))
    before = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    after = torch.tensor([0, 2, 0, 1, 1, 0, 2, 2, 2])
    for name, table in composition.named_parameters():
        table.data.copy_(torch.arange(16.0).view(4, 4) + (100 if name == "C3" else 0))
    composition.requires_grad_(False)
    # By latent: entry (latent of the tier, latent of the tier below).
    old = {(f, g): float(composition.C2[i, j]) for i, f in enumerate((3, 4, 5)) for j, g in enumerate((0, 1, 2))}
    moments = {table: (2 * table.clone(), 3 * table.clone()) for table in composition.parameters()}
    view = replace(shaping.make_views(rng, shaping.make_sae(rng))(), moments=moments.__getitem__)
    composition.follow(view, before, after)
    for table, (first, second) in moments.items():
        assert torch.equal(first, 2 * table) and torch.equal(second, 3 * table)
    for i, f in enumerate((3, 4)):
        for j, g in enumerate((0, 2, 5)):
            assert float(composition.C2[i, j]) == (old[f, g] if g != 5 else 0.0)
    assert float(composition.C2[2:].abs().sum() + composition.C2[:, 3:].abs().sum()) == 0.0
    assert float(composition.C3[0].abs().sum()) == 0.0, "the latent that came begins with nothing"


def structure(frequency, losses, **settings):
    moves = Moves(**({"every_steps": 1, "idle_frequency": 0.01, "most_at_once": 1.0, "drift": 0.5} | settings))
    made = Structure(moves, (4, 4, 4), ())
    made.frequency.copy_(torch.tensor(frequency))
    made.losses.copy_(torch.tensor(losses))
    return made


MEMBERSHIP = torch.arange(3).repeat_interleave(4)
IDLE = [0.5, 0.001, 0.0, 0.2, 0.002, 0.5, 0.5, 0.5, 0.0, 0.003, 0.0, 0.5]


def test_idle_latents_go_to_the_tier_that_leaves_most_of_what_reached_it():
    # The tiers leave 0.4 of 1, 0.3 of 0.4 (three quarters), 0.1 of 0.3: the second leaves most.
    moved = structure(IDLE, [0.4, 0.3, 0.1])
    after = moved.reassigned(MEMBERSHIP, torch.zeros(12, dtype=torch.bool))
    assert (after != MEMBERSHIP).nonzero().view(-1).tolist() == [2, 8], "two may come: the least active ones"
    assert after[[2, 8]].tolist() == [1, 1]


def test_dead_latents_are_free_to_go_and_limits_hold():
    busy = [0.5] * 12
    dead = torch.zeros(12, dtype=torch.bool)
    assert torch.equal(structure(busy, [0.9, 0.1, 0.01]).reassigned(MEMBERSHIP, dead), MEMBERSHIP)
    dead[4:8] = True
    after = structure(busy, [0.9, 0.1, 0.01]).reassigned(MEMBERSHIP, dead)
    assert torch.bincount(after, minlength=3).tolist() == [6, 2, 4], "no tier loses or gains more than half"
    after = structure(busy, [0.9, 0.1, 0.01], most_at_once=0.1).reassigned(MEMBERSHIP, dead)
    assert int((after == 0).sum()) == 5
    after = structure(busy, [0.9, 0.1, 0.01], most_at_once=0.01).reassigned(MEMBERSHIP, dead)
    assert int((after == 0).sum()) == 5, "a hundredth of twelve latents is still one"


def test_moves_happen_in_training_and_are_logged(battery):
    config = battery.quick("tiered", moves_every_steps=5, idle_frequency=0.9, moves_at_once=0.05, tier_drift=0.25)
    trainee, reports = battery.train(config, 20)
    membership = trainee.sae.extras["tiers"].membership
    assert not torch.equal(membership, membership.sort().values)
    scalars = reports[-1].scalars()
    assert scalars["tiers/moves"] > 0
    sizes = torch.bincount(membership, minlength=3)
    assert sum(scalars[f"tiers/size_{tier}"] for tier in (1, 2, 3)) == 96 and sizes.max() <= 40 and sizes.min() >= 24


def test_what_lies_beyond_a_tiers_size_stays_zero_after_moves(battery):
    settings = {"moves_every_steps": 5, "idle_frequency": 0.9, "moves_at_once": 0.05, "tier_drift": 0.25}
    trainee, _ = battery.train(battery.quick("tiered", composition_weight=0.05, **settings), 23)
    tiers, composition = (trainee.sae.extras[name] for name in ("tiers", "composition"))
    for tier in (1, 2):
        table = getattr(composition, f"C{tier + 1}")
        for entries in (table, *trainee.optimiser.moments(table)):
            assert entries.any()
            entries.data[: len(tiers.members(tier)), : len(tiers.members(tier - 1))] = 0.0
            assert not entries.any()


def test_what_a_move_changes_is_what_the_loss_changes_by(sae, rng, shaping):
    view, membership = shaping.make_views(rng, sae)(), sae.extras["tiers"].membership
    found, before = changes(view, membership, 3), weighted_loss(view, membership, 3)
    torch.testing.assert_close(before, (oracle_losses(view) * torch.tensor(WEIGHTS)).sum().detach())
    for latent in range(shaping.LATENTS):
        for tier in range(3):
            after = membership.clone()
            after[latent] = tier
            torch.testing.assert_close(found[latent, tier], weighted_loss(view, after, 3) - before, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("room", "floor"), [((6, 8, 10), (4, 6, 6)), (SIZES, SIZES)], ids=["drift", "exchange alone"])
def test_living_latents_move_until_no_move_or_exchange_lowers_the_loss(sae, rng, shaping, room, floor):
    """Tiers drift within their bounds, and the loss falls with every round."""
    view, membership = shaping.make_views(rng, sae)(), sae.extras["tiers"].membership.clone()
    losses = [float(weighted_loss(view, membership, 3))]
    while not torch.equal(membership, after := reallocated(view, membership, room, floor, most=3)):
        assert 0 < int((after != membership).sum()) <= 3
        membership = after
        sizes = torch.bincount(membership, minlength=3)
        assert all(low <= int(size) <= high for low, size, high in zip(floor, sizes, room, strict=True))
        losses.append(float(weighted_loss(view, membership, 3)))
    assert len(losses) > 2 and losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("most", [0, 1, 40, 400])
def test_moves_are_chosen_without_a_look_at_each_latent_by_itself(rng, monkeypatch, most):
    """At 262,144 latents that took two seconds. Sizes forbid all moves but exchanges of the two that are best for it;
    some changes are equal."""
    change_FT = torch.randint(-9, 20, (600, 3), generator=rng).float()
    membership = torch.randint(0, 3, (600,), generator=rng)
    sizes = torch.bincount(membership).tolist()
    expected, taken = [], set()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        leaving = sorted((float(change_FT[f, other]), f) for f in range(600) if membership[f] == one and f not in taken)
        coming = sorted((float(change_FT[f, one]), f) for f in range(600) if membership[f] == other and f not in taken)
        for (lost, first), (won, second) in zip(leaving, coming, strict=False):
            if lost + won < 0 and len(taken) + 2 <= most:
                expected.append((lost + won, [(first, other), (second, one)]))
                taken |= {first, second}
    looks, look = [], torch.Tensor.__getitem__
    monkeypatch.setattr(torch.Tensor, "__getitem__", lambda tensor, place: looks.append(0) or look(tensor, place))
    found = choose(change_FT, membership, sizes, sizes, most)
    assert found == [group for _, group in sorted(expected, key=lambda one: one[0])] and len(looks) < 50
    assert len(found) == min(most // 2, len(expected)) and (most < 400 or len(found) > 50)


def test_living_latents_move_in_training_and_losses_of_tiers_end_lower(battery):
    """None is idle: without them nothing moves."""
    idle, live = (
        battery.train(battery.quick("tiered", moves_every_steps=5, moves_at_once=0.1, moves_live=on, **EASY), 31)
        for on in (False, True)
    )
    assert float(idle[1][-1].measured["tiers/moves"]) == 0 < float(live[1][-1].measured["tiers/moves"])
    assert float(live[1][-1].measured["loss/reconstruction"]) < float(idle[1][-1].measured["loss/reconstruction"])


def test_each_tiers_gradient_is_clipped_alone(sae, rng, shaping):
    views = shaping.make_views(rng, sae)
    TieredReconstruction()(views()).backward()
    before = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    tier = sae.extras["tiers"].membership
    norms = torch.tensor(
        [sum(float(before[n][tier == t].square().sum()) for n in ("W_enc", "b_enc", "W_dec")) ** 0.5 for t in range(3)]
    )
    clip = float(norms.median())
    TierGradients(clip).before_step(sae)
    torch.testing.assert_close(sae.extras["tiers"].grad_norm.float(), norms)
    for t in range(3):
        factor = min(1.0, clip / float(norms[t]))
        torch.testing.assert_close(sae.W_dec.grad[tier == t], before["W_dec"][tier == t] * factor)
    assert torch.equal(sae.b_dec.grad, before["b_dec"])


def test_noise_is_in_proportion_to_the_gradient(sae, rng, shaping):
    sae.W_dec.grad = torch.full_like(sae.W_dec, 3.0)
    sae.b_dec.grad = torch.zeros_like(sae.b_dec)
    GradientNoise(0.5, rng).before_step(sae)
    assert float((sae.W_dec.grad - 3.0).std()) == pytest.approx(1.5, rel=0.2)
    assert not sae.b_dec.grad.any()


def test_noise_is_drawn_anew_in_every_step_so_its_step_is_not_recorded(sae, rng, monkeypatch):
    monkeypatch.setattr(hardware, "READ_AT_ONCE", set())
    monkeypatch.setattr(device_copies, "is_recording", lambda: True)
    sae.W_dec.grad, before = torch.full_like(sae.W_dec, 3.0), rng.get_state()
    with pytest.raises(device_copies.NotRecordable):
        GradientNoise(0.5, rng).before_step(sae)
    assert torch.equal(rng.get_state(), before)


def test_a_tier_that_is_still_off_takes_no_latents_and_none_of_the_auxiliary_loss(battery):
    settings = {"moves_every_steps": 3, "idle_frequency": 0.9, "moves_at_once": 0.05}
    config = battery.quick("tiered", base="topk", curriculum=(0.0, 0.4, 0.7), **settings)
    trainee = Trainee("one", config.build(battery.D), battery.STEPS)
    tiers, before = trainee.sae.extras[TIERS], trainee.sae.extras[TIERS].membership.clone()
    for step, batch in enumerate(battery.batches(config, battery.STEPS)):
        knobs = trainee.assembly.knobs_at(step, battery.STEPS)
        is_off = torch.tensor([knobs.get(switch_name(tier), 1.0) == 0 for tier in range(3)])
        retired = retired_of(trainee.sae, knobs)
        assert retired is None if not is_off.any() else torch.equal(retired, is_off[tiers.membership])
        trainee.step(batch)
        if min(knobs.get(switch_name(tier), 1.0) for tier in range(3)) < 1:
            assert torch.equal(tiers.membership, before)
    assert not torch.equal(tiers.membership, before)


def test_a_tier_stays_silent_until_its_time(battery):
    config = battery.quick("tiered", curriculum=(0.0, 0.25, 0.5))
    _, reports = battery.train(config)
    activity = [[float(report.measured[f"tiers/activity_{tier}"]) for tier in (1, 2, 3)] for report in reports]
    assert all(row[0] > 0 for row in activity)
    assert [row[1] > 0 for row in activity] == [step > 10 for step in range(battery.STEPS)]
    assert [row[2] > 0 for row in activity] == [step > 20 for step in range(battery.STEPS)]
