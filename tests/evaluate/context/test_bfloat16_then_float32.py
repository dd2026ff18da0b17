"""A choice by coarse products and a second look is the choice by exact ones, whatever the numbers are."""

from __future__ import annotations

import pytest
import torch

from saemill.evaluate.context import bfloat16_then_float32
from saemill.evaluate.context.bfloat16_then_float32 import Affine, largest_products, products_above

ROWS, WIDTH, LATENTS, K = 40, 24, 2048, 9


@pytest.fixture(autouse=True)
def _in_bfloat16(monkeypatch):
    """Any processor computes it, if slowly."""
    monkeypatch.setattr(bfloat16_then_float32, "has_fast_bfloat16", lambda kind: True)


def numbers(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, W and b."""
    made = torch.Generator().manual_seed(3)
    x, W = torch.randn(ROWS, WIDTH, generator=made), torch.randn(LATENTS, WIDTH, generator=made)
    b = torch.randn(LATENTS, generator=made)
    if kind == "massive rows and long latents":
        x[::7] *= 1e4
        W[::5] *= 100
    if kind == "rounded to one number":  # neighbours are 2^-12 apart, where bfloat16 has steps of 2^-8
        x[:], W[:], b[:] = 0, 0, 0
        x[:, 0], W[:, 0] = 1, 1 + torch.randperm(LATENTS, generator=made) * 2.0**-20
    if kind == "all below zero":
        b -= 1e3
    if kind == "few above zero":
        b[: LATENTS - K // 2] -= 1e3
    if kind == "against rounding":  # what rounding takes from x and W adds up
        x, W, b = torch.full_like(x, 1 + 2**-8 - 2**-12), torch.full_like(W, 1 + 2**-8 - 2**-12), b * 0
        W[: LATENTS // 2] = 1 + 2**-9
    if kind == "one row, long sums":
        x, W = torch.randn(1, 2304, generator=made), torch.randn(LATENTS, 2304, generator=made)
    if kind == "a row that is no number":
        x[1, 2] = torch.nan
    if kind == "not numbers":
        x[1, 2], W[70, 3], b[900] = torch.nan, -torch.nan, torch.inf
    return x, W, b


KINDS = ["random", "massive rows and long latents", "rounded to one number", "all below zero", "few above zero"]
KINDS += ["against rounding", "one row, long sums", "a row that is no number", "not numbers"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_are_those_of_the_exact_products(kind):
    x, W, b = numbers(kind)
    values, latents = largest_products(Affine(W, b), x, K)
    exact = (x.double() @ W.double().T + b).nan_to_num(1e30, 1e30)
    longest, most = W.norm(dim=1).nan_to_num(1).amax(), b[b.isfinite()].abs().amax()
    tolerance = 1e-6 * (x.norm(dim=1).nan_to_num(1).double() * longest + most)[:, None]
    assert all(len(set(row)) == K for row in latents.tolist())
    chosen = exact.gather(1, latents.long())
    assert (chosen.amin(1, keepdim=True) >= exact.topk(K).values[:, -1:] - tolerance).all()
    assert ((values.double().nan_to_num(1e30, 1e30) - chosen).abs() <= tolerance).all()


@pytest.mark.parametrize("kind", KINDS[:-2])
def test_coarse_products_are_within_their_bound(kind):
    x, W, b = numbers(kind)
    coarse, wrong = Affine(W, b).look(x), Affine(W, b).bound(x)
    apart = (coarse.double() - (x.double() @ W.double().T + b)).abs()
    own = coarse.double().abs() * 2**-8  # rounded to the nearest of 8 bits
    assert (apart <= wrong[:, None] + own).all()
    if kind == "against rounding":
        assert (apart.amax(1) > 0.95 * wrong).all()  # it is reached: nothing in it is idle


def test_what_may_be_as_large_passes_the_bound():
    """One number rounded up, others that far below it as both may be wrong, over two octaves, where steps change."""
    number = 1 + torch.arange(3072) / 1024
    reached = number.to(torch.bfloat16).float()
    for both in torch.arange(1, 200) / 2048:
        bound = bfloat16_then_float32.bits(bfloat16_then_float32.lowest_candidate(reached, both / 2))
        assert ((number - both).to(torch.bfloat16).view(torch.int16).numpy() >= bound).all()


@pytest.mark.parametrize("is_for_each", [False, True])
def test_all_that_is_above_a_threshold_is_found(is_for_each):
    x, W, b = numbers("random")
    floor = torch.linspace(12, 16, LATENTS) if is_for_each else torch.tensor(14.0).expand(LATENTS)
    found = products_above(Affine(W, b), x, floor, most_share=0.5)
    assert found is not None
    values, support = found
    exact = x.double() @ W.double().T + b
    places = support.rows.long() * LATENTS + support.latents
    torch.testing.assert_close(values.double(), exact.view(-1)[places], rtol=0, atol=1e-5)
    assert set((exact > floor).view(-1).nonzero().view(-1).tolist()) <= set(places.tolist())
    assert len(places) < 2 * int((exact > floor).sum())


@pytest.mark.parametrize(("floor", "share"), [(-0.1, 1.0), (0.01, 1.0), (1.0, 0.05)])
def test_no_second_look_where_it_would_be_at_most_of_them(floor, share):
    x, W, b = numbers("random")
    assert products_above(Affine(W, b), x, torch.full((LATENTS,), floor), share) is None


def test_few_are_looked_at_again(monkeypatch):
    looked = []
    again = Affine.look_again
    monkeypatch.setattr(Affine, "look_again", lambda *at: looked.append(len(at[2].latents)) or again(*at))
    x, W, b = numbers("random")
    x[5] = 0  # it has no bound, and is not looked at again either
    largest_products(Affine(W, b - 5), x, K)
    assert K * (ROWS - 1) <= looked[0] < 2 * K * ROWS


def test_one_massive_row_leaves_the_others_a_threshold():
    x, W, b = numbers("random")
    x[3] *= 1e4
    found = products_above(Affine(W, b), x, torch.full((LATENTS,), 14.0), most_share=0.1)
    assert found is not None
    counts = found[1].offsets.diff()
    assert counts[3] == LATENTS and counts.sum() - LATENTS < ROWS * 60
