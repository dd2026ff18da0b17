"""The sparse products and their gradients against autograd on the dense formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saemill.train.sae.kernels.codes import Codes
from saemill.train.sae.kernels.sparse_products import latent_sum, row_sum
from saemill.train.sae.kernels.sparse_products_with_gradients import (
    affine,
    decode_at,
    spread_latents,
    spread_rows,
    squared_error,
)
from saemill.train.sae.kernels.sparse_support import Support, support_from_flat, support_from_topk

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def mask_of(support: Support) -> Tensor:
    """The dense 0/1 table of a support, entry by entry."""
    mask = torch.zeros(support.num_rows, support.num_latents)
    for row in range(support.num_rows):
        for entry in range(int(support.offsets[row]), int(support.offsets[row + 1])):
            mask[row, int(support.latents[entry])] = 1.0
    return mask


def random_support(rows: int, latents: int, share: float, generator: torch.Generator) -> Support:
    mask = torch.rand(rows, latents, generator=generator) < share
    return support_from_flat(mask.view(-1).nonzero().view(-1), rows, latents)


def to(support: Support, device: str) -> Support:
    return Support(support.offsets.to(device), support.latents.to(device), support.num_latents)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(12, 10, 17), (17, 10, 12)], ids=["more latents", "more rows"])
def test_encode_gate_decode_has_the_gradients_of_the_dense_formula(device, share, shape, rng):
    rows, width, latents = shape
    support = to(random_support(rows, latents, share, rng), device)
    mask = mask_of(support).to(device)
    x, target = (torch.randn(rows, width, generator=rng).to(device) for _ in range(2))
    leaves = {
        "W_enc": torch.randn(latents, width, generator=rng),
        "b_enc": torch.randn(latents, generator=rng),
        "W_dec": torch.randn(latents, width, generator=rng),
        "b_dec": torch.randn(width, generator=rng),
        "scale": torch.rand(latents, generator=rng),
        "row_scale": torch.rand(rows, generator=rng),
    }
    ours = {name: value.clone().to(device).requires_grad_() for name, value in leaves.items()}
    dense = {name: value.clone().to(device).requires_grad_() for name, value in leaves.items()}

    pre = affine((x - ours["b_dec"]).detach(), ours["b_dec"], ours["W_enc"], ours["b_enc"], support)
    acts = pre.relu() * spread_latents(ours["scale"], support) * spread_rows(ours["row_scale"], support)
    x_hat = decode_at(acts, ours["W_dec"], ours["b_dec"], support)
    loss = squared_error(x_hat, target - x_hat) + acts.sum() / 7

    pre_dense = (x - dense["b_dec"]) @ dense["W_enc"].t() + dense["b_enc"]
    acts_dense = pre_dense.relu() * mask * dense["scale"] * dense["row_scale"][:, None]
    x_hat_dense = acts_dense @ dense["W_dec"] + dense["b_dec"]
    loss_dense = (target - x_hat_dense).square().sum(1).mean() + acts_dense.sum() / 7

    torch.testing.assert_close(loss, loss_dense, rtol=1e-5, atol=1e-5)
    loss.backward()
    loss_dense.backward()
    for name in leaves:
        torch.testing.assert_close(ours[name].grad, dense[name].grad, rtol=1e-5, atol=1e-5, msg=name)


def test_gradients_hold_at_a_real_size_to_1e_5_of_their_norm(rng):
    rows, width, latents, k = 256, 192, 1024, 16
    x = torch.randn(rows, width, generator=rng)
    W = torch.nn.functional.normalize(torch.randn(latents, width, generator=rng), dim=1)
    ours, dense = W.clone().requires_grad_(), W.clone().requires_grad_()
    zeros = torch.zeros(latents)
    support = support_from_topk((x @ W.t()).topk(k).indices, latents)
    acts = affine(x, None, ours, zeros, support)
    x_hat = decode_at(acts, ours, None, support)
    squared_error(x_hat, x - x_hat).backward()
    acts_dense = (x @ dense.t()) * mask_of(support)
    (x - acts_dense @ dense).square().sum(1).mean().backward()
    assert ours.grad is not None and dense.grad is not None
    assert (ours.grad - dense.grad).norm() <= 1e-5 * dense.grad.norm()


def test_double_precision_gradients_pass_finite_differences(rng):
    support = random_support(5, 6, 0.5, rng)
    x = torch.randn(5, 4, generator=rng).double()
    W, V = (torch.randn(6, 4, generator=rng).double().requires_grad_() for _ in range(2))
    b = torch.randn(6, generator=rng).double().requires_grad_()
    c = torch.randn(4, generator=rng).double().requires_grad_()

    def loss(W, b, V, c):
        return decode_at(affine(x, None, W, b, support).tanh(), V, c, support)

    assert torch.autograd.gradcheck(loss, (W, b, V, c))


def test_an_input_that_needs_a_gradient_gets_one(rng):
    support = random_support(5, 6, 0.5, rng)
    x = torch.randn(5, 4, generator=rng).requires_grad_()
    W, b = torch.randn(6, 4, generator=rng), torch.zeros(6)
    affine(x, None, W, b, support).square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    ((expected @ W.t()) * mask_of(support)).square().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), latents=st.integers(1, 9), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_support_and_its_transpose_say_the_same(rows, latents, share, seed):
    support = random_support(rows, latents, share, torch.Generator().manual_seed(seed))
    mask = mask_of(support)
    turned = support.by_latent
    back = torch.zeros(rows, latents)
    for latent in range(latents):
        for entry in range(int(turned.offsets[latent]), int(turned.offsets[latent + 1])):
            back[int(turned.rows[entry]), latent] = 1.0
    assert torch.equal(mask, back)
    values = torch.randn(support.latents.numel(), generator=torch.Generator().manual_seed(seed))
    dense = Codes(values, support, rows, latents).dense()
    torch.testing.assert_close(latent_sum(support, values), dense.sum(0))
    torch.testing.assert_close(row_sum(support, values), dense.sum(1))
    assert torch.equal(dense != 0, (mask != 0) & (dense != 0))


def test_codes_count_firing_alike_in_both_forms(rng):
    support = random_support(20, 11, 0.3, rng)
    values = torch.randn(support.latents.numel(), generator=rng)
    sparse = Codes(values, support, 20, 11)
    dense = Codes(sparse.dense(), None, 20, 11)
    assert torch.equal(sparse.fired, dense.fired)
    assert sparse.l0 == dense.l0
    torch.testing.assert_close(sparse.latent_totals(), dense.latent_totals())
    torch.testing.assert_close(sparse.sum_over_latents(sparse.values), dense.sum_over_latents(dense.values))
    torch.testing.assert_close(sparse.mean_over_rows(), dense.mean_over_rows())
