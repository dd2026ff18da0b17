"""Gates: the arithmetic worked by hand, and training against inference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saemill.train.sae.gates import AnnealedRelu, BatchTopK, Gate, Gated, JumpRelu, Relu, TopK
from saemill.train.sae.kernels.sparse_support import Support
from saemill.train.sae.model import SparseAutoencoder
from saemill.train.sae.side_inputs import NO_SIDE, Side


def opened(gate: Gate, pre: Tensor, side: Side = NO_SIDE) -> Tensor:
    """Training activations [B, F] of an SAE whose pre-activations are `pre`."""
    latents = pre.shape[1]
    sae = SparseAutoencoder(torch.eye(latents), torch.eye(latents), gate)
    return sae.codes(pre, side).dense().detach()


PRE = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.1, 0.2, -5.0, -0.3]])


def test_topk_keeps_the_k_largest_of_each_row_and_no_negative_one():
    # row 0: 3 and 2; row 1: 0.2 and 0.1
    expected = torch.tensor([[3.0, 0.0, 2.0, 0.0], [0.1, 0.2, 0.0, 0.0]])
    assert torch.equal(opened(TopK(2), PRE), expected)
    assert torch.equal(TopK(2).infer(PRE, torch.zeros(4)), expected)
    # k = 3 reaches into row 1's negative values, which stay off
    assert torch.equal(opened(TopK(3), PRE)[1], torch.tensor([0.1, 0.2, 0.0, 0.0]))


def test_batchtopk_keeps_the_k_b_largest_of_the_batch():
    # the four largest of both rows: 3, 2, 0.5 in row 0 and 0.2 in row 1
    expected = torch.tensor([[3.0, 0.0, 2.0, 0.5], [0.0, 0.2, 0.0, 0.0]])
    assert torch.equal(opened(BatchTopK(2), PRE), expected)
    # half a latent per token: the single largest
    assert opened(BatchTopK(0.5), PRE).count_nonzero() == 1


def test_the_batchtopk_threshold_is_the_mean_of_the_smallest_kept():
    gate = BatchTopK(2, threshold_decay=0.5)
    sae = SparseAutoencoder(torch.eye(4), torch.eye(4), gate)
    smallest = []
    for scale in (1.0, 3.0, 2.0, 5.0):
        codes = sae.codes(PRE * scale)
        gate.observe(codes, NO_SIDE)
        smallest.append(0.2 * scale)
    # mean of the first two, then a running mean with decay 1/2
    expected = 0.5 * (0.5 * (0.5 * (smallest[0] + smallest[1]) + smallest[2]) + smallest[3])
    assert float(gate.threshold) == pytest.approx(expected, rel=1e-6)
    kept = gate.infer(PRE, torch.zeros(4))
    assert torch.equal(kept, torch.where(gate.threshold < PRE, PRE, 0.0))


def test_a_batch_in_which_nothing_fires_leaves_the_threshold():
    gate = BatchTopK(2)
    sae = SparseAutoencoder(torch.eye(4), torch.eye(4), gate)
    gate.observe(sae.codes(-PRE.abs()), NO_SIDE)
    assert (float(gate.threshold), int(gate.threshold_steps)) == (0.0, 0)


def test_jumprelu_is_strict_at_its_threshold():
    gate = JumpRelu(4, 0.2, 0.1)
    expected = torch.tensor([[3.0, 0.0, 2.0, 0.5], [0.0, 0.0, 0.0, 0.0]])  # 0.2 is not above 0.2
    assert torch.equal(opened(gate, PRE), expected)
    assert torch.equal(gate.infer(PRE, torch.zeros(4)).detach(), expected)


def test_jumprelu_thresholds_learn_in_their_unit():
    gate = JumpRelu(4, 0.03, 0.01, unit=10.0)
    assert torch.equal(opened(gate, PRE), opened(JumpRelu(4, 0.3, 0.1), PRE))
    assert float(gate.threshold[0].detach()) == pytest.approx(0.3)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
def test_jumprelu_has_the_straight_through_gradients_of_its_paper(share, rng, monkeypatch):
    monkeypatch.setattr("saemill.train.sae.gates.DENSE_SHARE", share)
    rows, latents, width = 200, 6, 0.4
    pre = torch.randn(rows, latents, generator=rng)
    gate = JumpRelu(latents, 0.3, width)
    sae = SparseAutoencoder(torch.eye(latents), torch.eye(latents), gate)
    codes = sae.codes(pre)
    assert (codes.support is None) == (share == 0.0)
    weights = torch.randn(rows, latents, generator=rng)
    (codes.dense() * weights).sum().backward()
    window = ((pre - 0.3).abs() < width / 2).float()
    expected = -(0.3 / width) * (weights * window).sum(0)
    torch.testing.assert_close(gate.raw_threshold.grad, expected)
    torch.testing.assert_close(sae.b_enc.grad, (weights * (pre > 0.3)).sum(0))

    gate.raw_threshold.grad = None
    (gate.marks(sae.codes(pre)).sum() / rows).backward()
    torch.testing.assert_close(gate.raw_threshold.grad, -window.sum(0) / width / rows)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
def test_gated_follows_its_formula_and_sends_no_gradient_to_the_gate(share, rng, monkeypatch):
    monkeypatch.setattr("saemill.train.sae.gates.DENSE_SHARE", share)
    gate = Gated(5)
    gate.r_mag.data = 0.3 * torch.randn(5, generator=rng)
    gate.b_mag.data = 0.3 * torch.randn(5, generator=rng)
    sae = SparseAutoencoder(torch.randn(5, 4, generator=rng), torch.randn(5, 4, generator=rng), gate)
    sae.b_enc.data = 0.3 * torch.randn(5, generator=rng)
    x = torch.randn(30, 4, generator=rng)
    projected = x @ sae.W_enc.t()
    expected = (projected + sae.b_enc > 0) * torch.relu(projected * gate.r_mag.exp() + gate.b_mag)
    codes = sae.codes(x)
    torch.testing.assert_close(codes.dense(), expected)
    torch.testing.assert_close(sae.encode(x), expected)
    codes.values.sum().backward()
    torch.testing.assert_close(sae.b_enc.grad, torch.zeros(5), rtol=0, atol=1e-5)
    assert float(gate.b_mag.grad.abs().sum()) > 0


def test_annealing_keeps_the_penalty_of_the_batch_at_hand(rng):
    gate = AnnealedRelu(unit=2.0)
    sae = SparseAutoencoder(torch.eye(6), torch.eye(6), gate)
    with torch.no_grad():
        codes = sae.codes(torch.randn(50, 6, generator=rng))
    before = float(gate.penalty_scale * gate.powers(codes, 0.9))
    gate.observe(codes, Side(knobs={"p": 0.9, "next_p": 0.4}))
    assert float(gate.penalty_scale * gate.powers(codes, 0.4)) == pytest.approx(before, rel=1e-5)


def test_powers_are_those_of_the_activations(rng):
    gate = AnnealedRelu(unit=2.0)
    pre = torch.randn(50, 6, generator=rng)
    codes = SparseAutoencoder(torch.eye(6), torch.eye(6), gate).codes(pre)
    acts = pre.relu()
    expected = (acts[acts > 0] / 2.0).pow(0.5).sum() / 50
    torch.testing.assert_close(gate.powers(codes, 0.5), expected)


def test_relu_chooses_the_sparse_form_when_it_pays(rng):
    pre = torch.randn(100, 100, generator=rng)
    gate = Relu()
    assert gate.choose(pre, NO_SIDE) is None
    support = gate.choose(pre - 2.5, NO_SIDE)
    assert support is not None
    assert torch.equal(opened(gate, pre - 2.5), (pre - 2.5).relu())


@pytest.mark.parametrize("product", ["float32", "bfloat16"])
def test_values_are_float32_whatever_the_encoder_product(product, rng):
    W = torch.nn.functional.normalize(torch.randn(64, 32, generator=rng), dim=1)
    sae = SparseAutoencoder(W, W.clone(), TopK(4), encoder_product=product)
    x = torch.randn(20, 32, generator=rng)
    codes = sae.codes(x)
    exact = (x @ W.t()).relu()
    dense = codes.dense()
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense, torch.where(dense > 0, exact, 0.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("centres_input", [True, False])
def test_inputs_in_bfloat16_are_encoded_in_float32(centres_input):
    sae = SparseAutoencoder(torch.eye(4), torch.eye(4), Relu(), centres_input=centres_input)
    acts = sae.encode(PRE.bfloat16())
    assert acts.dtype == torch.float32
    assert torch.equal(acts, PRE.bfloat16().float().relu())


def test_a_gate_of_ones_own_is_saved_with_its_variant():
    """Its weights alone would open as another SAE, or not at all: that was told after the last step."""

    class Own(TopK):
        def infer(self, pre: Tensor, b_enc: Tensor) -> Tensor:
            return 2.0 * super().infer(pre, b_enc)

    class OnlyInTraining(TopK):
        def choose(self, pre: Tensor, side: Side) -> Support | None:
            return None

    tables = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    found = {gate: SparseAutoencoder(*tables, gate(2)).is_plain for gate in (TopK, Own, OnlyInTraining)}
    assert found == {TopK: True, Own: False, OnlyInTraining: True}
