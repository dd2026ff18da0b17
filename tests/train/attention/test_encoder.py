"""An encoder that reads attention: its formula, its start, its way to disk and back."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from saemill.cache_schema.strict_json import from_json, to_json
from saemill.train.data.scaling import unit_stats
from saemill.train.disk.sae_lens_folder import read_sae, save_sae
from saemill.train.engine.step import Trainee
from saemill.train.engine.terms_and_constraints import Assembly
from saemill.train.kit.variant_registry import config_type
from saemill.train.kit.wrapping import build_base
from saemill.train.sae.attention.attention_encoder import AttendedSae, Attention, Mixing
from saemill.train.sae.attention.attention_links import LinkKind
from saemill.train.sae.gates import Relu
from saemill.train.sae.model import SparseAutoencoder
from saemill.train.sae.side_inputs import Side
from saemill.train.sae.step_view import View
from saemill.train.terms.auxk import AuxK


def moved(assembly: Assembly, rng: torch.Generator) -> Assembly:
    """With an encoder that uses what it reads."""
    assembly.sae.U.data.normal_(generator=rng)
    return assembly


def oracle(sae: AttendedSae, x: Tensor, tables: list[Tensor], weights: Tensor) -> Tensor:
    """Pre-activations, token by token."""
    rank, rows = sae.V.shape[0] // len(tables), []
    for row in range(len(x)):
        pre = (x[row] - sae.b_dec) @ sae.W_enc.t() + sae.b_enc
        present = [index for index, table in enumerate(tables) if table[row].any()]
        for index in present:
            own = slice(index * rank, (index + 1) * rank)
            brought = tables[index][row] @ (x - sae.b_dec)
            share = weights[index] / weights[present].sum()
            pre = pre + share * (brought @ sae.V[own].t() @ sae.U[:, own].t())
        rows.append(pre)
    return torch.stack(rows)


@pytest.fixture
def made(guidance: Any, rng: torch.Generator) -> tuple[AttendedSae, Tensor, Any]:
    """In float64, over windows with holes."""
    windows = guidance.make_windows(rng, dtype=torch.float64)
    tables = [torch.randn(guidance.LATENTS, guidance.D, generator=rng, dtype=torch.float64) for _ in range(2)]
    base = SparseAutoencoder(*tables, Relu(), b_dec=torch.ones(guidance.D, dtype=torch.float64))
    sae = AttendedSae(base, Attention(guidance.LAYERS), Mixing((17, 18, 20)), 2, rng).double()
    sae.mixing.theta.data.copy_(torch.tensor([0.5, -0.2, 0.1]))
    sae.U.data.normal_(generator=rng)
    return sae, torch.randn(windows.rows, guidance.D, generator=rng, dtype=torch.float64), windows


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", get_args(LinkKind))
def test_rows_that_nobody_may_read_are_to_all_others_as_if_they_were_not_there(made, rng, kind, apart):
    """As massive rows are in held-out text: there, with no number in `row_of`. In training they are not there."""
    sae, x, windows = made
    sae.attention = dataclasses.replace(sae.attention, kind=kind, apart=apart)
    places = windows.places
    token = torch.randint(0, 2, (windows.rows,), generator=rng)
    is_read = torch.rand(windows.rows, generator=rng) > 0.2
    row_of = windows.row_of.clone()
    row_of[places.window[~is_read], places.position[~is_read]] = -1
    masked = sae.encode(x.where(is_read[:, None], 1e6), Side({**windows.side, "row_of": row_of, "token": token}))
    row_of[row_of >= 0] = torch.arange(int(is_read.sum()))
    side = {"window": places.window[is_read], "position": places.position[is_read], "token": token[is_read]}
    absent = sae.encode(x[is_read], Side({**side, "row_of": row_of, "attention": windows.attention}))
    assert bool((~is_read).any())
    torch.testing.assert_close(masked[is_read], absent)


def test_the_encoder_is_its_formula(guidance, made):
    sae, x, windows = made
    tables = [guidance.oracle_links(windows, layer) for layer in guidance.LAYERS]
    expected = oracle(sae, x, tables, sae.mixing(1.0)).relu()
    side = Side(windows.side)
    torch.testing.assert_close(sae.encode(x, side), expected)
    torch.testing.assert_close(sae.codes(x, side).dense(), expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.autograd.grad(
        (sae.codes(x, side).dense() * weights).sum(), list(sae.parameters())[:5], allow_unused=True
    )
    slow = torch.autograd.grad((expected * weights).sum(), list(sae.parameters())[:5], allow_unused=True)
    for one, other in zip(found, slow, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_gradients_are_finite_differences(made):
    sae, x, windows = made
    side = Side(windows.side)

    def loss() -> Tensor:
        return sae.codes(x, side).values.square().sum() + sae.codes(x, side).values.sum()

    names = ("V", "U", "W_enc", "b_enc", "b_dec", "mixing.theta")
    parameters = [sae.get_parameter(name) for name in names]
    for parameter, grad in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
        flat, place, step = parameter.data.view(-1), parameter.numel() // 2, 1e-6
        flat[place] += step
        above = float(loss().detach())
        flat[place] -= 2 * step
        below = float(loss().detach())
        flat[place] += step
        assert float(grad.flatten()[place]) == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
def test_dead_latents_learn_what_they_read_through_attention_too(share, made, rng, monkeypatch):
    monkeypatch.setattr("saemill.train.terms.auxk.DENSE_SHARE", share)
    sae, x, windows = made
    side, dead = Side(windows.side), torch.arange(sae.num_latents) % 3 == 0
    view = View(x, x, side, sae, dead, unit_stats(x.shape[1]), rng)
    attended = sae.attended(x, side).detach()
    pre = ((x - sae.b_dec.detach()) @ sae.W_enc.t() + attended @ sae.U.t() + sae.b_enc)[:, dead]
    acts = torch.where(pre >= pre.topk(2, dim=1).values[:, -1:], pre, 0.0).relu()
    error = view.residual
    expected = (error - acts @ sae.W_dec[dead]).square().sum() / (error - error.mean(0)).square().sum()
    found = AuxK(2)(view)
    torch.testing.assert_close(found, expected)
    parameters = [sae.U, sae.W_enc, sae.b_enc, sae.W_dec]
    own, slow = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (found, expected))
    torch.testing.assert_close(own, slow)
    assert own[0][dead].any() and torch.autograd.grad(found, sae.V, allow_unused=True)[0] is None


@pytest.mark.parametrize("base", ["standard", "topk", "jumprelu", "batchtopk"])
def test_it_starts_as_its_base_and_every_parameter_moves(battery, base):
    config = battery.quick("hierarchical", base=base, guidance="encode", rank=3)
    batch = battery.batches(config, 1)[0]
    assembly, plain = config.build(battery.D), build_base(config, battery.D)
    side = battery.side_for(assembly, batch)
    torch.testing.assert_close(assembly.sae.encode(batch.x, side), plain.sae.encode(batch.x), rtol=1e-5, atol=1e-5)
    trainee = Trainee("one", assembly, battery.STEPS)
    trainee.step_index = battery.STEPS // 2
    before = {name: parameter.detach().clone() for name, parameter in trainee.sae.named_parameters()}
    for batch in battery.batches(config, 3):
        report = trainee.step(batch)
    assert not [name for name, parameter in trainee.sae.named_parameters() if torch.equal(before[name], parameter)]
    assert {"mixing/weight_17", "mixing/weight_20"} <= report.measured.keys()


def test_disk_and_back(battery, tmp_path):
    config = battery.quick("hierarchical", guidance="encode", rank=3, mixing_temperature_start=1.5)
    trainee, _ = battery.train(config, 3)
    assembly = trainee.assembly
    stats = dataclasses.replace(assembly.input_stats, scale=torch.full((battery.D,), 0.5))
    knobs = assembly.knobs_at(battery.STEPS, battery.STEPS)
    save_sae(tmp_path, trainee.sae, stats, {"layers": [19]}, to_json(config), "hierarchical", None, knobs)
    loaded = read_sae(tmp_path, lambda variant, raw, d, _: from_json(config_type(variant), raw).build(d).sae)
    assert loaded.needs_side == ("attention", "row_of")
    batch = battery.batches(config, 1)[0]
    side = Side(batch.side)
    with torch.no_grad():
        raw = loaded.encode(batch.x / 0.5, side)
        trained = trainee.sae.encode(batch.x, side.with_knobs(knobs))
        torch.testing.assert_close(raw > 0, trained > 0)
        torch.testing.assert_close(loaded.decode(raw) * 0.5, trainee.sae.decode(trained), rtol=1e-4, atol=1e-4)
    without = Side({name: value for name, value in batch.side.items() if name != "attention"})
    with pytest.raises(LookupError, match="expected a side input 'attention'"):
        loaded.encode(batch.x, without)


@pytest.mark.parametrize("control", [{"shuffle_attention": True}, {"links": "nearest"}, {"links": "same_token"}])
def test_controls_reach_an_encoder_without_the_loss_and_come_back_from_disk(battery, control, tmp_path):
    """They train at alpha = 0, read other links than the encoder that they control, and name all that they read."""
    config = battery.quick("attention", guidance="encode", alpha=0.0, rank=3, **control)
    trainee, reports = battery.train(config, 4)
    assert "loss/guidance" not in reports[-1].measured and trainee.sae.U.detach().any()
    batch = battery.batches(config, 1)[0]
    save_sae(tmp_path, trainee.sae, trainee.assembly.input_stats, {"layers": [19]}, to_json(config), "attention")
    loaded = read_sae(tmp_path, lambda variant, raw, d, _: from_json(config_type(variant), raw).build(d).sae)
    read = Side({name: batch.side[name] for name in loaded.needs_side})
    with torch.no_grad():
        found = loaded.encode(batch.x, read)
        torch.testing.assert_close(found, trainee.sae.encode(batch.x, read), rtol=1e-4, atol=1e-4)
        trainee.sae.attention = dataclasses.replace(trainee.sae.attention, apart=False, kind="attention")
        assert not torch.allclose(found, trainee.sae.encode(batch.x, read), atol=1e-3)


def test_a_lone_window_has_no_other_windows_attention(battery, rng):
    config = battery.quick("attention", guidance="encode", shuffle_attention=True)
    assembly = moved(config.build(battery.D), rng)
    batch = battery.batches(config, 1, rows=30)[0]
    with torch.no_grad():
        plain = build_base(config, battery.D).sae.encode(batch.x)
        torch.testing.assert_close(assembly.sae.encode(batch.x, battery.side_for(assembly, batch)), plain)
