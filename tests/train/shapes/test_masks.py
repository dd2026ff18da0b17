"""Masks, range encoders, adapters and norms against slow versions, in training and at inference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from saemill.train.engine.step import _lr_scales
from saemill.train.errors import ConfigInvalid
from saemill.train.sae.gates import AbsTopK, BatchTopK, Gated, JumpRelu, Relu, TopK
from saemill.train.sae.shapes.masks import FREE, HardMask, PositionGate, SoftMask, range_of, spread_over_ranges
from saemill.train.sae.shapes.range_encoders import Adapters, FeatureAdapters, RangeEncoders
from saemill.train.sae.shapes.shaped_sae import PreNorm, ShapedAutoencoder, orthogonal_rows
from saemill.train.sae.side_inputs import Side
from saemill.train.sae.step_view import DeadLatents
from saemill.train.terms.auxk import AuxK
from saemill.train.terms.position import mass_by_range, retention
from saemill.train.terms.reconstruction_and_sparsity import TargetL0, gate_l1, l1, reconstruction

RANGES, CONTEXT, LATENTS = 3, 12, 20


def gate_of(name):
    gates = {"relu": Relu, "topk": lambda: TopK(4), "gated": lambda: Gated(LATENTS)}
    gates |= {"jumprelu": lambda: JumpRelu(LATENTS, 0.4, 0.2), "batchtopk": lambda: BatchTopK(3)}
    gates |= {"abstopk": lambda: AbsTopK(4)}
    return gates[name]().double()


def hard_mask():
    return HardMask(spread_over_ranges(LATENTS, RANGES, 0.75), CONTEXT, RANGES)


def soft_mask(rng, **settings):
    bound = torch.rand(LATENTS, generator=rng) < 0.8
    return SoftMask(bound, CONTEXT * torch.rand(LATENTS, generator=rng), 2.0, 0.05, **settings).double()


def gate_mask(rng):
    gate = PositionGate(LATENTS, CONTEXT, 3, rng).double()
    for parameter in gate.parameters():
        parameter.data.normal_(generator=rng)
    return gate


SHAPES = {"hard": lambda rng: hard_mask(), "soft": soft_mask, "gate": gate_mask}


def oracle_factor(kind, shape, positions):
    """[B, F], entry by entry."""
    table = torch.ones(len(positions), LATENTS, dtype=torch.float64)
    for row, position in enumerate(positions.tolist()):
        for latent in range(LATENTS):
            if kind == "hard" and shape.range[latent] != FREE:
                owner = int(shape.range[latent])
                inside = owner * CONTEXT / RANGES <= position < (owner + 1) * CONTEXT / RANGES
                table[row, latent] = float(inside)
            if kind == "soft" and shape.bound[latent]:
                height = torch.exp(-((position - shape.centre[latent].detach()) ** 2) / (2 * shape.sigma**2))
                table[row, latent] = height if height >= shape.cutoff else 0.0
            if kind == "gate":
                table[row, latent] = 2 * torch.sigmoid(shape.a[latent] + shape.u[latent] @ shape.e[position]).detach()
    return table


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("gate", ["relu", "topk", "jumprelu", "gated", "batchtopk", "abstopk"])
def test_training_and_inference_multiply_by_the_mask(kind, gate, rng, shaping):
    shape = SHAPES[kind](rng)
    sae = ShapedAutoencoder(shaping.make_sae(rng, gate_of(gate)), {"mask": shape})
    view = shaping.make_views(rng, sae)()
    factor = oracle_factor(kind, shape, view.side["position"])
    pre = (view.x - sae.b_dec) @ sae.W_enc.t() + sae.b_enc
    outside, inside = (factor, 1.0) if gate == "gated" else (1.0, factor)
    expected = sae.gate.infer(pre * inside, sae.b_enc) * outside
    if gate != "batchtopk":  # training keeps the largest of the batch, inference what passes a threshold
        torch.testing.assert_close(view.codes.dense(), expected)
    torch.testing.assert_close(sae.encode(view.x, view.side), expected)
    if gate in ("relu", "topk", "abstopk") and kind == "hard":
        assert not view.codes.dense()[factor == 0].any() and view.codes.dense()[factor == 1].any()


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
def test_the_gate_path_of_a_gated_sae_learns_inside_only(share, rng, shaping, monkeypatch):
    monkeypatch.setattr("saemill.train.sae.gates.DENSE_SHARE", share)
    mask = hard_mask()
    sae = ShapedAutoencoder(shaping.make_sae(rng, gate_of("gated")), {"mask": mask})
    view = shaping.make_views(rng, sae)()
    assert (view.codes.support is None) == (share == 0.0)
    factor = oracle_factor("hard", mask, view.side["position"])
    pre = (view.x - sae.b_dec) @ sae.W_enc.t() + sae.b_enc
    expected, found = (pre.relu() * factor).sum(1).mean() / shaping.D**0.5, gate_l1(view)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, sae.W_enc), torch.autograd.grad(expected, sae.W_enc))


def test_thresholds_of_a_jump_learn_inside_only(shaping, monkeypatch):
    """Dense or sparse. Their windows reach below 0, to which a closed latent is multiplied."""
    gradients = []
    for share in (0.0, 1.0):
        monkeypatch.setattr("saemill.train.sae.gates.DENSE_SHARE", share)
        inner = shaping.make_sae(rng_at(7), JumpRelu(LATENTS, 0.4, 1.0).double())
        sae = ShapedAutoencoder(inner, {"mask": hard_mask()})
        view = shaping.make_views(rng_at(8), sae)()
        assert (view.codes.support is None) == (share == 0.0)
        gradients += torch.autograd.grad(reconstruction(view) + TargetL0(3.0)(view), sae.gate.raw_threshold)
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("gate", ["relu", "topk", "gated"])
def test_slopes(kind, gate, rng, shaping):
    sae = ShapedAutoencoder(shaping.make_sae(rng, gate_of(gate)), {"mask": SHAPES[kind](rng)})
    views = shaping.make_views(rng, sae)
    shaping.assert_slopes(lambda: reconstruction(views()), sae, rng)
    shaping.assert_slopes(lambda: l1(views()), sae, rng)


def test_topk_chooses_among_the_latents_that_may_fire(rng, shaping):
    sae = ShapedAutoencoder(shaping.make_sae(rng, TopK(4)), {"mask": hard_mask()})
    sae.b_enc.data.fill_(20.0)  # all latents would fire
    assert float(shaping.make_views(rng, sae)().codes.l0) == 4.0


def test_no_gradient_reaches_a_latent_outside_its_range(rng, shaping):
    mask = hard_mask()
    sae = ShapedAutoencoder(shaping.make_sae(rng, Relu()), {"mask": mask})
    mask.range[3] = RANGES + 5  # a range that no position has
    view = shaping.make_views(rng, sae)()
    (grad,) = torch.autograd.grad(reconstruction(view), sae.W_enc)
    assert not grad[3].any() and grad[mask.range == FREE].any()


def test_dead_latents_learn_inside_their_ranges_only(rng, shaping):
    mask = hard_mask()
    sae = ShapedAutoencoder(shaping.make_sae(rng, Relu()), {"mask": mask})
    view = shaping.make_views(rng, sae)()
    dead = torch.tensor([0, 7, 19])
    codes = view.codes
    part = sae.with_factors(type(codes)(torch.ones(len(view.x), 3).double(), None, len(view.x), 3), view.side, dead)
    expected = oracle_factor("hard", mask, view.side["position"])[:, dead]
    torch.testing.assert_close(part.dense(), expected)


def test_a_progressive_mask_begins_at_the_plain_codes_and_ends_at_the_mask(rng, shaping):
    inner = shaping.make_sae(rng, Relu())
    plain = shaping.make_views(rng, inner)()
    mask = soft_mask(rng, learns_offset=True)
    mask.offset.data.fill_(0.7)
    sae = ShapedAutoencoder(inner, {"mask": mask})
    views = {c: shaping.make_views(rng, sae, mask_coefficient=c)() for c in (0.0, 0.3, 1.0)}
    assert torch.equal(
        sae.codes(plain.x, plain.side.with_knobs({"mask_coefficient": 0.0})).dense(), plain.codes.dense()
    )
    moved = 0.3 * torch.tensor(0.7).exp() / (0.3 * torch.tensor(0.7).exp() + 0.7)
    assert float(mask.coefficient(views[0.3].side).detach()) == pytest.approx(float(moved))
    assert float(mask.coefficient(views[1.0].side).detach()) == 1.0
    with torch.no_grad():
        mask.offset.fill_(-40.0)  # beside 1 such odds are nothing
        assert float(mask.coefficient(views[1.0].side)) == 1.0
        mask.offset.fill_(0.7)
    shaping.assert_slopes(lambda: reconstruction(shaping.make_views(rng_at(5), sae, mask_coefficient=0.3)()), mask, rng)


def test_the_offset_of_a_soft_mask_learns_at_the_rate_of_the_sae(battery):
    """Centres have many tokens to go; a step of so much in the offset would open or close the mask at once."""
    settings = {"mask": "soft", "sigma": 3.0, "progressive": (0.1, 0.6), "learned_coefficient": True}
    scales = _lr_scales(battery.config_of("positional", **settings).build(battery.D).sae)
    assert {name: scales[f"shapes.mask.{name}"] for name in ("centre", "offset")} == {"centre": 90.0, "offset": 1.0}


def rng_at(seed):
    return torch.Generator().manual_seed(seed)


def test_the_penalty_before_the_mask_sees_what_the_mask_hides(rng, shaping):
    sae = ShapedAutoencoder(shaping.make_sae(rng, Relu()), {"mask": hard_mask()})
    view = shaping.make_views(rng, sae)()
    pre = (view.x - sae.b_dec) @ sae.W_enc.t() + sae.b_enc
    torch.testing.assert_close(sae.unmasked(view.x, view.side).dense(), pre.relu())


def test_each_range_has_its_encoder(rng, shaping):
    inner = shaping.make_sae(rng, Relu())
    shape = RangeEncoders(inner.W_enc.detach()[:8].expand(RANGES, -1, -1), CONTEXT, embeds=True).double()
    for parameter in shape.parameters():
        parameter.data.normal_(generator=rng)
    sae = ShapedAutoencoder(inner, {"range_encoders": shape})
    views = shaping.make_views(rng, sae)
    view = views()
    for row, position in enumerate(view.side["position"].tolist()):
        index = position * RANGES // CONTEXT
        x = view.x[row] - sae.b_dec + shape.embedding[index]
        own = shape.W[index] @ x + sae.b_enc[:8]
        shared = sae.W_enc[8:] @ (view.x[row] - sae.b_dec + shape.embedding[index]) + sae.b_enc[8:]
        expected = torch.cat([own, shared]).relu()
        torch.testing.assert_close(view.codes.dense()[row], expected)
    torch.testing.assert_close(sae.encode(view.x, view.side), view.codes.dense())
    shaping.assert_slopes(lambda: reconstruction(views()), sae, rng)


@pytest.mark.parametrize("gate", ["relu", "topk"])
def test_adapters_add_what_their_range_says(gate, rng, shaping):
    inner = shaping.make_sae(rng, gate_of(gate))
    plain = shaping.make_views(rng, inner)()
    shape = Adapters(shaping.D, 4, CONTEXT, RANGES, 1.0, rng).double()
    sae = ShapedAutoencoder(inner, {"adapters": shape})
    torch.testing.assert_close(sae.codes(plain.x, plain.side).dense(), plain.codes.dense(), rtol=0, atol=0)
    for parameter in shape.parameters():
        parameter.data.normal_(generator=rng)
    views = shaping.make_views(rng, sae, adapter_coefficient=0.5)
    view = views()
    rows = []
    for row, position in zip(view.x, view.side["position"].tolist(), strict=True):
        r = position * RANGES // CONTEXT
        normed = (row - row.mean()) / (row.var(correction=0) + 1e-5).sqrt()
        hidden = torch.nn.functional.gelu(normed @ shape.inner[r] + shape.inner_bias[r])
        rows.append(row + 0.5 * shape.gate[r].sigmoid() * (hidden @ shape.outer[r]))
    expected = sae.gate.infer((torch.stack(rows) - sae.b_dec) @ sae.W_enc.t() + sae.b_enc, sae.b_enc)
    torch.testing.assert_close(view.codes.dense(), expected)
    torch.testing.assert_close(sae.encode(view.x, view.side), expected)
    shaping.assert_slopes(lambda: reconstruction(views()), sae, rng)


def test_adapters_on_features_read_what_fires_and_add_before_the_gate(rng, shaping):
    inner = shaping.make_sae(rng, TopK(5))
    plain = shaping.make_views(rng, inner)()
    shape = FeatureAdapters(LATENTS, 4, CONTEXT, RANGES, 1.0, rng).double()
    sae = ShapedAutoencoder(inner, {"adapters": shape})
    torch.testing.assert_close(sae.codes(plain.x, plain.side).dense(), plain.codes.dense())
    for parameter in shape.parameters():
        parameter.data.normal_(generator=rng)
    views = shaping.make_views(rng, sae, adapter_coefficient=0.5)
    view, rows = views(), []
    pre = (view.x - sae.b_dec) @ sae.W_enc.t() + sae.b_enc
    for row, position in zip(pre, view.side["position"].tolist(), strict=True):
        r = position * RANGES // CONTEXT
        fires = row.relu()
        normed = (fires - fires.mean()) / (fires.var(correction=0) + 1e-5).sqrt()
        hidden = torch.nn.functional.gelu(normed @ shape.inner[r] + shape.inner_bias[r])
        rows.append(row + 0.5 * shape.gate[r].sigmoid() * (hidden @ shape.outer[r]))
    expected = sae.gate.infer(torch.stack(rows), sae.b_enc)
    torch.testing.assert_close(view.codes.dense(), expected)
    torch.testing.assert_close(sae.encode(view.x, view.side), expected)
    assert shape.gate.shape == (RANGES, LATENTS)
    shaping.assert_slopes(lambda: reconstruction(views()), sae, rng)


def test_the_norm_stands_before_the_gate_or_behind_a_relu(rng):
    pre = torch.randn(7, LATENTS, generator=rng)
    group, side = torch.zeros(LATENTS, dtype=torch.int64), Side({})
    before, behind = PreNorm(group, 1), PreNorm(group, 1, rectifies=True)
    torch.testing.assert_close(behind.change_pre(pre, side), before.change_pre(pre.relu(), side))
    assert not torch.allclose(behind.change_pre(pre, side), before.change_pre(pre, side), atol=0.1)


def test_encoders_of_ranges_begin_alike_or_each_at_its_own(battery):
    """Orthogonal ones lean on each other nowhere within a block, whichever range they are of."""
    settings = {"mask": "none", "range_encoders": True, "range_encoder_share": 8 / 96}
    same, drawn, orthogonal = (
        battery.config_of("positional", **settings, **more).build(battery.D).sae.shapes["range_encoders"].W.detach()
        for more in ({}, {"independent_encoders": True}, {"independent_encoders": True, "init": "orthogonal"})
    )
    assert torch.equal(same[0], same[3])
    rows = torch.nn.functional.normalize(drawn.flatten(0, 1), dim=1)
    assert (rows @ rows.t() - torch.eye(32)).abs().max() < 0.7
    torch.testing.assert_close(drawn.norm(dim=2), same.norm(dim=2))
    rows = orthogonal.flatten(0, 1)  # four ranges of eight latents: one block of the width's 32
    torch.testing.assert_close(rows @ rows.t(), torch.eye(32), rtol=0, atol=1e-5)


def test_a_curriculum_lowers_the_rate_and_raises_the_penalty_as_adapters_come_in(battery):
    phases = {"adapter_from": (0.25, 0.5), "adapted_rate": 0.2, "unadapted_penalty": 0.5}
    settings = {"mask": "none", "adapters": True}
    plain, phased = (battery.config_of("positional", **settings, **more).build(battery.D) for more in ({}, phases))
    (old,), (new,) = ([term.weight for term in each.terms if term.fn is l1] for each in (plain, phased))
    for step, rate, penalty in ((0, 1.0, 0.5), (250, 1.0, 0.5), (375, 0.6, 0.75), (500, 0.2, 1.0), (999, 0.2, 1.0)):
        assert phased.rate(step, 1000) == pytest.approx(rate * plain.rate(step, 1000))
        assert new(step, 1000) == pytest.approx(penalty * old(step, 1000))


def test_norm_is_of_each_row_and_group(rng, shaping):
    group = torch.randint(0, 3, (LATENTS,), generator=rng)
    norm = PreNorm(group, 3).double()
    norm.gain.data.normal_(generator=rng)
    norm.bias.data.normal_(generator=rng)
    sae = ShapedAutoencoder(shaping.make_sae(rng, TopK(5)), {"norm": norm})
    views = shaping.make_views(rng, sae)
    view = views()
    pre = (view.x - sae.b_dec) @ sae.W_enc.t() + sae.b_enc
    expected = pre.clone()
    for g in range(3):
        part = pre[:, group == g]
        spread = (part.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        expected[:, group == g] = (part - part.mean(1, keepdim=True)) / spread * norm.gain[group == g]
    expected = expected + norm.bias
    torch.testing.assert_close(norm.change_pre(pre, view.side), expected)
    torch.testing.assert_close(view.codes.dense(), sae.gate.infer(expected, sae.b_enc))
    shaping.assert_slopes(lambda: reconstruction(views()), sae, rng)


@pytest.mark.parametrize("gate", [TopK(5), AbsTopK(5)], ids=["topk", "signed"])
def test_retention_is_the_mean_share_inside(gate, rng, shaping):
    sae = ShapedAutoencoder(shaping.make_sae(rng, gate), {"gate": gate_mask(rng)})
    view = shaping.make_views(rng, sae)()
    acts, here = view.codes.dense().detach().abs(), view.side["position"] * RANGES // CONTEXT
    mass = torch.stack([acts[here == r].sum(0) for r in range(RANGES)])
    torch.testing.assert_close(mass_by_range(view, CONTEXT, RANGES), mass)
    owner = spread_over_ranges(LATENTS, RANGES, 0.75)
    shares = [mass[owner[f], f] / mass[:, f].sum() for f in range(15) if mass[:, f].sum() > 0]
    torch.testing.assert_close(retention(mass, owner), torch.stack(shares).mean())


def test_ranges_cover_the_window_and_latents_spread_evenly():
    assert range_of(torch.arange(8), 8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.bincount(spread_over_ranges(16, 4, 0.5) + 1).tolist() == [8, 2, 2, 2, 2]


def test_orthogonal_rows_are_orthogonal_in_each_block(rng):
    rows = orthogonal_rows(20, 8, rng)
    for start in (0, 8, 16):
        block = rows[start : start + 8]
        torch.testing.assert_close(block @ block.t(), torch.eye(len(block)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mask", "range_encoders"])
def test_the_control_scatters_ranges_of_the_same_size(battery, kind, rng):
    """A latent fires at as many positions as before, which are no longer a stretch of the window."""
    settings = {"mask": "hard", "masked_share": 1.0} if kind == "mask" else {"mask": "none", "range_encoders": True}
    config = battery.config_of("positional", base="standard", scattered=True, **settings)
    shape = config.build(battery.D).sae.shapes[kind]
    side = Side({"position": torch.arange(config.length)})
    here = range_of(shape.position(side), config.length, config.ranges)
    assert torch.bincount(here).tolist() == [config.length // config.ranges] * config.ranges
    assert int((here.diff() != 0).sum()) > 2 * config.ranges
    if kind == "mask":
        codes = config.build(battery.D).sae.codes(torch.randn(config.length, battery.D, generator=rng), side).dense()
        outside = here[:, None] != shape.range
        assert not codes[outside].any() and codes[~outside].any()


def test_there_must_be_ranges_to_scatter(battery):
    with pytest.raises(ConfigInvalid, match="scattered: expected ranges to scatter"):
        battery.config_of("positional", mask="static_slicing", scattered=True).needs()


@pytest.mark.parametrize("kind", ["ranges", "norm", "on_input", "on_features"])
@pytest.mark.parametrize("k", [3, 99], ids=["some", "all"])
@pytest.mark.parametrize("more", [0, 4])
def test_dead_latents_learn_from_the_pre_activations_that_the_codes_are_made_of(
    kind, k, more, rng, shaping, monkeypatch
):
    """Through the encoders that are really read; those of living latents, and what brings the input, are left alone."""
    monkeypatch.setattr("saemill.train.terms.auxk.DENSE_SHARE", 1.0)
    inner = shaping.make_sae(rng, JumpRelu(LATENTS, 0.4, 0.2).double())
    shape = {
        "ranges": lambda: RangeEncoders(inner.W_enc.detach()[:8].expand(RANGES, -1, -1), CONTEXT, embeds=True),
        "norm": lambda: PreNorm(torch.arange(LATENTS) % 2, 2),
        "on_input": lambda: Adapters(shaping.D, 4, CONTEXT, RANGES, 1.0, rng),
        "on_features": lambda: FeatureAdapters(LATENTS, 4, CONTEXT, RANGES, 1.0, rng),
    }[kind]().double()
    for parameter in shape.parameters():
        parameter.data.normal_(generator=rng)
    sae = ShapedAutoencoder(inner, {"shape": shape})
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    dead[[2, 5, 7, 8, 13, 19]] = True
    view = shaping.make_views(rng, sae, dead)()
    if more:  # as on a GPU, whose list of dead latents is filled up
        latents = torch.argsort(dead.byte(), descending=True, stable=True)[: 6 + more]
        view = dataclasses.replace(view, list_dead=lambda: DeadLatents(latents, dead[latents]))
    pre = sae.pre_codes(view.x, view.side, lambda pre, side: None).values[:, dead]
    kept = torch.zeros_like(pre).scatter(1, pre.topk(min(k, 6), dim=1).indices, 1.0)
    left = view.residual - (pre * kept).relu() @ sae.W_dec[dead]
    spread = (view.residual - view.residual.mean(0)).square().sum(1).mean()
    found, expected = AuxK(k)(view), left.square().sum(1).mean() / spread
    torch.testing.assert_close(found, expected)
    named = dict(sae.named_parameters())
    own, slow = (
        dict(
            zip(
                named,
                torch.autograd.grad(loss, [*named.values()], retain_graph=True, materialize_grads=True),
                strict=True,
            )
        )
        for loss in (found, expected)
    )
    for name in ("W_enc", "b_enc"):
        torch.testing.assert_close(own[name][dead], slow[name][dead])
        assert not own[name][~dead].any() and own["b_enc"][dead].any()
    assert not own["b_dec"].any()
    if kind == "ranges":
        first = dead[:8]
        torch.testing.assert_close(own["shapes.shape.W"][:, first], slow["shapes.shape.W"][:, first])
        assert own["shapes.shape.W"][:, first].any() and not own["shapes.shape.W"][:, ~first].any()
        assert not own["W_enc"][:8].any() and not own["shapes.shape.embedding"].any()
    if kind == "on_input":
        assert not any(own[f"shapes.shape.{name}"].any() for name in ("inner", "outer", "gate"))
