"""Products of 16-bit models where the processor has none: made in float32, and the same to a rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saemill.cache_schema import Site
from saemill.harvest.capture import run
from saemill.harvest.model import products_in_16_bits
from saemill.harvest.model.architectures import ARCHITECTURES
from saemill.harvest.model.load_and_truncate import Wanted, truncate

HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # by how much a rounding changes a number


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_product_is_the_exact_one_rounded_once(monkeypatch, dtype):
    monkeypatch.setattr(products_in_16_bits, "is_widened", lambda device, dtype: True)
    x, W, b = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((7, 300), (5, 300), (5,)))
    x, W, b = x.to(dtype), W.to(dtype), b.to(dtype)
    for found, exact in (
        (products_in_16_bits.linear(x, W, b), x.double() @ W.double().T + b.double()),
        (products_in_16_bits.linear(x, W, None), x.double() @ W.double().T),
        (products_in_16_bits.matmul(x, W.T), x.double() @ W.double().T),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=HALF[dtype], atol=1e-5)


@pytest.mark.parametrize("is_widened", [True, False], ids=["widened", "plain"])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_models_give_the_same_to_a_rounding(make_model, run_whole, monkeypatch, is_widened, model_type):
    monkeypatch.setattr(products_in_16_bits, "is_widened", lambda device, dtype: False)
    model = make_model(model_type, torch.bfloat16)
    layers_of = ARCHITECTURES[model_type].layers_of
    before = {name: weight.clone() for name, weight in layers_of(model.base_model).named_parameters()}
    reference = run_whole(model)
    last = len(reference.resid) - 1
    monkeypatch.setattr(products_in_16_bits, "is_widened", lambda device, dtype: is_widened)
    truncated = truncate(model, Wanted(resid_layers=(last,)))
    kinds = {type(module).__name__.removeprefix("Widened"): type(module) for module in truncated.stack.modules()}
    wide = {name: kind.__name__.startswith("Widened") for name, kind in kinds.items() if name in ("Linear", "Conv1D")}
    assert wide == {"Conv1D" if model_type == "gpt2" else "Linear": is_widened}
    for name, weight in layers_of(truncated.stack).named_parameters():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, before[name])
    found, expected = run(truncated, reference.ids, {})[Site("resid", last)], reference.resid[last].float()
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.02 * expected.norm()


def test_float32_and_processors_with_instructions_are_left_alone(monkeypatch):
    products_in_16_bits.is_widened.cache_clear()
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for has_them in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_them=has_them: has_them)
        products_in_16_bits.is_widened.cache_clear()
        assert products_in_16_bits.is_widened("cpu", torch.bfloat16) is not has_them
        assert not products_in_16_bits.is_widened("cpu", torch.float32)
        assert not products_in_16_bits.is_widened("cuda", torch.bfloat16)
    products_in_16_bits.is_widened.cache_clear()


def test_a_gradient_passes(monkeypatch):
    monkeypatch.setattr(products_in_16_bits, "is_widened", lambda device, dtype: True)
    layer = nn.Sequential(nn.Linear(4, 3).bfloat16().requires_grad_(False))
    products_in_16_bits.widen_products(layer)
    x = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer[0].weight.sum(0).expand(2, 4), rtol=0.02, atol=0.02)
