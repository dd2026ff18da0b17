"""Loss terms against slow, obvious versions."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saemill.train.data.scaling import unit_stats
from saemill.train.sae.gates import AnnealedRelu, BatchTopK, Gate, Gated, JumpRelu, Relu, TopK
from saemill.train.sae.kernels import sparse_support
from saemill.train.sae.kernels.sparse_support import index_sum
from saemill.train.sae.model import SparseAutoencoder
from saemill.train.sae.side_inputs import Side
from saemill.train.sae.step_view import DeadLatents, View
from saemill.train.terms.auxk import AuxK
from saemill.train.terms.reconstruction_and_sparsity import (
    LayerNormsL1,
    NestedReconstruction,
    TargetL0,
    dead_thresholds,
    gate_l1,
    l1,
    lp,
    reconstruction,
    reconstruction_by_gate,
)

ROWS, D, LATENTS = 40, 8, 20


def view_of(gate: Gate, rng: torch.Generator, dead: Tensor | None = None, **knobs: float) -> View:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    sae = SparseAutoencoder(draw(LATENTS, D), draw(LATENTS, D), gate, b_dec=draw(D), b_enc=draw(LATENTS))
    x = draw(ROWS, D)
    dead = torch.zeros(LATENTS, dtype=torch.bool) if dead is None else dead
    return View(x, x, Side(knobs=knobs), sae, dead, unit_stats(D), rng)


def gradients(view: View, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*view.sae.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    zeros = [torch.zeros_like(parameter) for parameter in parameters]
    return {name: zero if g is None else g for name, zero, g in zip(names, zeros, found, strict=True)}


def assert_same(view: View, loss: Tensor, oracle: Tensor) -> None:
    torch.testing.assert_close(loss, oracle, rtol=1e-5, atol=1e-6)
    found, expected = gradients(view, loss), gradients(view, oracle)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


def dense_acts(view: View) -> Tensor:
    """The same activations by plain autograd; the kept places are taken from the fast version."""
    pre = (view.x - view.sae.b_dec) @ view.sae.W_enc.t() + view.sae.b_enc
    return torch.where(view.codes.dense().detach() > 0, pre, 0.0)


@pytest.mark.parametrize("gate", [TopK(3), BatchTopK(3), Relu()], ids=["topk", "batchtopk", "relu"])
def test_reconstruction_is_the_share_of_variance_left(gate, rng):
    view = view_of(gate, rng)
    x_hat = dense_acts(view) @ view.sae.W_dec + view.sae.b_dec
    oracle = sum((view.x[row] - x_hat[row]).square().sum() for row in range(ROWS)) / ROWS / D
    assert_same(view, reconstruction(view), oracle)


def test_l1_is_the_sum_of_activations_over_root_width(rng):
    view = view_of(Relu(), rng)
    assert_same(view, l1(view), dense_acts(view).sum(1).mean() / D**0.5)


def test_lp_uses_the_knob_and_the_running_coefficient(rng):
    view = view_of(AnnealedRelu(unit=D**0.5), rng, p=0.5)
    view.sae.gate.penalty_scale.fill_(1.7)
    acts = dense_acts(view)
    oracle = 1.7 * (acts[acts > 0] / D**0.5).pow(0.5).sum() / ROWS
    assert_same(view, lp(view), oracle)


def test_target_l0_counts_what_is_active(rng):
    view = view_of(JumpRelu(LATENTS, 0.5, 0.3), rng)
    active = (dense_acts(view) > 0).double().sum(1).mean()
    torch.testing.assert_close(TargetL0(4.0)(view).double(), (active / 4.0 - 1.0) ** 2)


def test_the_l0_window_sees_pre_activations_below_the_threshold():
    """One row just below the threshold: the gated activation is zero, the derivative is not."""
    gate, x = JumpRelu(1, 1.0, 0.5), torch.tensor([[0.9]])
    sae = SparseAutoencoder(torch.ones(1, 1), torch.ones(1, 1), gate)
    TargetL0(1.0)(
        View(x, x, Side(), sae, torch.zeros(1, dtype=torch.bool), unit_stats(1), torch.Generator())
    ).backward()
    assert float(gate.raw_threshold.grad) == 4.0  # d (count - 1)^2 / d theta = 2 (0 - 1) * (-1 / 0.5)


def test_thresholds_of_dead_latents_are_brought_down_and_nothing_else_is_moved(rng):
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    dead[[2, 7, 11]] = True
    view = view_of(JumpRelu(LATENTS, 0.5, 0.3, unit=2.0), rng, dead)
    view = dataclasses.replace(view, retired=torch.arange(LATENTS) == 7)
    oracle = 2.0 * (view.sae.gate.raw_threshold[2] + view.sae.gate.raw_threshold[11])
    assert_same(view, dead_thresholds(view), oracle)


def test_the_gate_path_of_a_gated_sae(rng):
    view = view_of(Gated(LATENTS), rng)
    pre = (view.x - view.sae.b_dec) @ view.sae.W_enc.t() + view.sae.b_enc
    assert_same(view, gate_l1(view), pre.relu().sum(1).mean() / D**0.5)
    x_hat = pre.relu() @ view.sae.W_dec.detach() + view.sae.b_dec.detach()
    assert_same(view, reconstruction_by_gate(view), (view.x - x_hat).square().sum(1).mean() / D)


def test_layer_norms_weigh_the_l1_of_a_crosscoder(rng):
    view = view_of(Relu(), rng)
    norms = view.sae.W_dec.view(LATENTS, 2, D // 2).norm(dim=2).sum(1)
    assert_same(view, LayerNormsL1(2)(view), (dense_acts(view) * norms).sum(1).mean() / D**0.5)


@pytest.mark.parametrize("gate", [BatchTopK(4), TopK(4), Relu()], ids=["batchtopk", "topk", "relu"])
def test_nested_reconstruction_sums_the_prefixes_losses_each_weight_once(gate, rng):
    widths, weights = (3, 11, LATENTS), (0.5, 2.0, 1.0)
    view = view_of(gate, rng)
    acts = dense_acts(view)
    oracle = torch.zeros(())
    for width, weight in zip(widths, weights, strict=True):
        x_hat = acts[:, :width] @ view.sae.W_dec[:width] + view.sae.b_dec
        oracle = oracle + weight * (view.x - x_hat).square().sum(1).mean() / D
    assert_same(view, NestedReconstruction(widths, weights)(view), oracle)
    x_hat = acts @ view.sae.W_dec + view.sae.b_dec
    torch.testing.assert_close(view.residual, (view.x - x_hat).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_filled", [False, True], ids=["", "filled"])
@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize(("k", "share"), [(2, 0.0), (2, 1.0), (99, 0.0)], ids=["dense", "sparse", "all"])
def test_auxk_reconstructs_the_residual_by_the_largest_dead_latents(k, share, rectified, is_filled, rng, monkeypatch):
    monkeypatch.setattr("saemill.train.terms.auxk.DENSE_SHARE", share)
    dead = torch.rand(LATENTS, generator=rng) < 0.5
    view = view_of(TopK(3), rng, dead)
    view = dataclasses.replace(view, list_dead=lambda: filled(dead)) if is_filled else view
    error = (view.x - view.x_hat).detach()
    pre = (view.x - view.sae.b_dec.detach()) @ view.sae.W_enc.t() + view.sae.b_enc
    ranked = torch.where(dead, pre.detach(), -torch.inf)
    chosen = ranked.topk(min(k, int(dead.sum())), dim=1).indices
    acts = torch.zeros(ROWS, LATENTS).scatter(1, chosen, pre.gather(1, chosen))
    acts = acts.relu() if rectified else acts
    left = error - acts @ view.sae.W_dec
    spread = (error - error.mean(0)).square().sum(1).mean()
    assert_same(view, AuxK(k, rectified)(view), left.square().sum(1).mean() / spread)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
def test_auxk_chooses_signed_latents_from_a_filled_list(share, rng, monkeypatch):
    monkeypatch.setattr("saemill.train.terms.auxk.DENSE_SHARE", share)
    dead = torch.rand(LATENTS, generator=rng) < 0.5
    view = view_of(TopK(3), rng, dead)
    listed = dataclasses.replace(view, list_dead=lambda: filled(dead), cache={})
    term = AuxK(2, rectified=False, signed=True)
    assert_same(view, term(listed), term(view))


def filled(dead_F: Tensor) -> DeadLatents:
    """A list with four more latents, as on a GPU."""
    latents = torch.argsort(dead_F.byte(), descending=True, stable=True)[: int(dead_F.sum()) + 4]
    return DeadLatents(latents, dead_F[latents])


def test_the_auxiliary_loss_of_a_single_row_is_finite(rng):
    """It has no spread."""
    view = view_of(TopK(3), rng, torch.arange(LATENTS) < 6)
    one = dataclasses.replace(view, x=view.x[:1], target=view.x[:1], cache={}, notes={})
    loss = AuxK(2)(one)
    assert 0 < float(loss.detach()) < 1e5
    assert all(gradient.isfinite().all() for gradient in gradients(one, loss).values())


def test_auxk_chooses_by_the_product_of_the_encoder_and_computes_in_float32(rng, monkeypatch):
    """As on a GPU, where a dense product in float32 over many dead latents would be half of a step."""
    monkeypatch.setattr("saemill.train.terms.auxk.DENSE_SHARE", 1.0)
    monkeypatch.setattr("saemill.train.terms.auxk._product", lambda view: "bfloat16")
    view = view_of(TopK(3), rng, torch.ones(LATENTS, dtype=torch.bool))
    with torch.no_grad():
        view.sae.W_enc.copy_(view.sae.W_enc[0] + 0.01 * view.sae.W_enc)  # the two products differ in who is largest
        view.sae.b_enc.zero_()
        x, W = view.sae.centred(view.x), view.sae.W_enc
        low, exact = (x.bfloat16() @ W.bfloat16().t()).float(), x @ W.t()
    codes = AuxK(5, rectified=False)._codes(view, DeadLatents(torch.arange(LATENTS)), LATENTS)
    chosen = codes.support.latents.view(ROWS, 5).long()
    assert torch.equal(low.gather(1, chosen).amin(1), low.topk(5, dim=1).values.amin(1))
    torch.testing.assert_close(codes.values.view(ROWS, 5), exact.gather(1, chosen), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_auxk_reaches_encoder_rows_of_dead_latents_alone(rng):
    dead = torch.arange(LATENTS) == 5
    view = view_of(TopK(3), rng, dead)
    AuxK(4)(view).backward()
    rows = view.sae.W_enc.grad.abs().sum(1)
    assert rows[5] > 0 and not rows[~dead].any()


def test_the_target_of_auxk_is_free_of_the_decoder_bias(rng):
    """Dead latents that already write the residual exactly leave nothing over, whatever the bias is."""
    W = torch.eye(4)
    sae = SparseAutoencoder(W.clone(), W.clone(), BatchTopK(0.5), b_dec=torch.tensor([5.0, -3.0, 2.0, 1.0]))
    x = sae.b_dec.detach() + torch.rand(32, 4, generator=rng) * torch.tensor([10.0, 1.0, 1.0, 1.0])
    dead = torch.tensor([False, True, True, True])
    left = (x - sae.b_dec.detach()) * dead  # by the living latent
    view = View(x, x, Side(), sae, dead, unit_stats(4), torch.Generator(), residual_by=lambda _: left)
    assert float(AuxK(4)(view).detach()) < 1e-10


def test_auxk_is_zero_while_nothing_is_dead(rng):
    assert float(AuxK(4)(view_of(TopK(3), rng))) == 0.0


def test_no_sum_over_an_index_depends_on_the_order_of_a_gpus_atomics():
    """`index_sum` and the kernels' own sums sort on a GPU; whole numbers may be added in any order."""
    room = Path(sparse_support.__file__).parents[2]
    allowed = {"sae/kernels/sparse_support.py": 1, "sae/kernels/sparse_products.py": 3, "variants/treesae.py": 1}
    allowed["sae/attention/attention_links.py"] = 1
    found = {
        str(file.relative_to(room)): len(
            re.findall(r"\.(?:index_add|scatter_add|scatter_reduce)_?\(", file.read_text())
        )
        for folder in ("terms", "sae", "variants")
        for file in (room / folder).rglob("*.py")
    }
    assert {name: count for name, count in found.items() if count} == allowed


@pytest.mark.parametrize("shape", [(30,), (30, 4)])
def test_index_sum_adds_numbers_and_rows(shape, rng):
    values, index = torch.randn(shape, generator=rng), torch.randint(5, (30,), generator=rng)
    expected = torch.stack([values[index == place].sum(0) for place in range(5)])
    torch.testing.assert_close(index_sum(values, index, 5), expected)
    if values.ndim == 1:
        torch.testing.assert_close(sparse_support.sum_few(values, index, 5), expected)
