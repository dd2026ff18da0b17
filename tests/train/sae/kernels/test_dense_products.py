"""The encoder's product by oneDNN where that may be, by torch's own elsewhere."""

import pytest
import torch
from torch.nn import functional

from saemill.train.sae.kernels import dense_products as module
from saemill.train.sae.kernels.dense_products import dot, linear, linear_packed, packed


@pytest.fixture
def asked(monkeypatch):
    """How often oneDNN was asked."""
    if not module.has_onednn():
        pytest.skip("this torch has no oneDNN")
    calls = []
    found = module._is_for_onednn
    monkeypatch.setattr(module, "_is_for_onednn", lambda x, W: calls.append(found(x, W)) or calls[-1])
    return calls


@pytest.mark.parametrize("rows", [(5,), (3, 4), (1,)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_is_the_affine_map(asked, rng, rows, has_bias):
    x, W = torch.randn(*rows, 33, generator=rng), torch.randn(17, 33, generator=rng)
    b = torch.randn(17, generator=rng) if has_bias else None
    found = linear(x, W, b)
    assert asked == [True]
    wanted = functional.linear(x.double(), W.double(), None if b is None else b.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_views_that_are_not_contiguous_give_the_same(asked, rng):
    x, W = torch.randn(33, 6, generator=rng).t(), torch.randn(40, 33, generator=rng)[::2]
    torch.testing.assert_close(linear(x, W), functional.linear(x.contiguous(), W.contiguous()))
    assert asked == [True]


@pytest.mark.parametrize(
    ("x", "W"),
    [
        (torch.randn(4, 8).double(), torch.randn(3, 8).double()),
        (torch.randn(4, 8).bfloat16(), torch.randn(3, 8).bfloat16()),
        (torch.randn(0, 8), torch.randn(3, 8)),
        (torch.randn(4, 8, requires_grad=True), torch.randn(3, 8)),
    ],
    ids=["float64", "bfloat16", "no rows", "gradient"],
)
def test_all_else_is_torchs_own(asked, x, W):
    assert torch.equal(linear(x, W), functional.linear(x, W))
    assert asked == [False]


def test_a_parameter_without_gradient_is_read_by_onednn(asked, rng):
    x, W = torch.randn(4, 8, generator=rng), torch.nn.Parameter(torch.randn(3, 8, generator=rng))
    with torch.no_grad():
        linear(x, W)
    linear(x, W).sum().backward()
    assert asked == [True, False]
    assert W.grad is not None


@pytest.mark.parametrize("has_onednn", [True, False])
def test_weights_laid_out_before_give_the_same_for_any_rows(monkeypatch, rng, has_onednn):
    if not has_onednn:
        monkeypatch.setattr(module, "has_onednn", lambda: False)
    W, b = torch.randn(96, 40, generator=rng).bfloat16(), torch.randn(96, generator=rng).bfloat16()
    kept = packed(W)
    for rows in (1, 7, 64):
        x = torch.randn(rows, 40, generator=rng).bfloat16()
        torch.testing.assert_close(linear_packed(x, kept, b), functional.linear(x, W, b))


def test_a_sum_of_many_squares_keeps_its_digits(rng):
    """A batch's reconstruction error: 16 million numbers are 4,096 tokens of a width of 4,096."""
    x = torch.rand(1 << 12, 1 << 12, generator=rng)
    assert float(dot(x, x)) == pytest.approx(float(x.double().square().sum()), rel=2e-5)
    assert float(dot(x[:0], x[:0])) == 0.0


def test_no_piece_of_a_sum_has_more_numbers_than_the_library_can_count(monkeypatch):
    """A GPU's refuses 2^31; torch on a CPU would then add one by one, and no further than 2^24."""
    monkeypatch.setattr(module, "CPU_DOT", module.GPU_DOT)
    sizes = []
    monkeypatch.setattr(torch, "dot", lambda a, b: sizes.append(a.numel()) or a.sum())
    one = torch.ones(1).expand((1 << 31) + 5)
    assert float(module.dot(one, one)) == pytest.approx(2**31)
    assert sum(sizes) == len(one) and max(sizes) < 1 << 31
