"""Dense SAEs whose products run in bfloat16 or TF32: against float64, and nothing else moves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saemill.train.kit.variant_registry import config_type
from saemill.train.sae.kernels import dense_products as products
from saemill.train.sae.kernels.dense_products import multiply, product_on
from saemill.train.sae.side_inputs import NO_SIDE

DENSE = ["standard", "jumprelu", "gated", "p_anneal"]
D, F, B = 48, 160, 96
# Rounding to 2^-9 moves a share of about 2^-10 of the pre-activations over their threshold, and each brings or takes
# its whole gradient: the root of that share, 0.03, is what a table's error comes to. Far above float32's own, too.
LARGEST, SMALLEST, FLOAT32 = 0.05, 1e-4, 1e-5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Any processor can run it, at whatever speed."""
    monkeypatch.setattr(products, "has_fast_bfloat16", lambda device_type: True)


def gradients(variant: str, product: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Of reconstruction and a penalty on every activation."""
    sae = config_type(variant)(width=F, encoder_product=product).build(D).sae.to(device, dtype)
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    codes = sae.codes(x, NO_SIDE)
    assert codes.support is None and codes.values.dtype == dtype
    loss = (sae.reconstruct(codes) - x).square().sum() / B + 0.1 * codes.mean_over_rows()
    loss.backward()
    found = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None and p.grad.any()}
    assert found.keys() >= {"W_enc", "W_dec", "b_dec"}
    return {name: gradient.cpu().double() for name, gradient in found.items()}


def errors(variant: str, product: str, device: str) -> dict[str, float]:
    """Norm of the difference over the norm of the gradient, for each table."""
    exact, found = gradients(variant, "float32", torch.float64), gradients(variant, product, torch.float32, device)
    return {name: float((found[name] - exact[name]).norm() / exact[name].norm()) for name in ("W_enc", "W_dec")}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", DENSE)
def test_gradients_in_bfloat16_are_near_those_in_float64(variant, device):
    assert all(SMALLEST < error < LARGEST for error in errors(variant, "bfloat16", device).values())


@pytest.mark.parametrize("product", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["topk", "standard"])
def test_values_are_float32_where_latents_are_chosen_and_the_products_own_elsewhere(variant, product):
    sae = config_type(variant)(width=F, encoder_product=product).build(D).sae
    values = sae.codes(torch.randn(B, D, generator=torch.Generator().manual_seed(5)), NO_SIDE).values
    is_rounded = torch.equal(values, values.bfloat16().float())
    assert is_rounded == (variant == "standard" and product == "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("variant", DENSE)
def test_gradients_in_tf32_are_nearer_and_the_setting_is_put_back(variant):
    before = torch.backends.cuda.matmul.fp32_precision
    assert all(FLOAT32 < error < LARGEST / 2 for error in errors(variant, "tf32", "cuda").values())
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize("variant", DENSE)
def test_on_a_processor_tf32_is_float32(variant):
    assert product_on(torch.device("cpu"), "tf32") == "float32"
    plain, asked = (gradients(variant, product, torch.float32) for product in ("float32", "tf32"))
    assert all(torch.equal(plain[name], asked[name]) for name in plain)


@pytest.mark.parametrize("variant", DENSE)
def test_without_being_asked_for_no_product_is_low(variant, monkeypatch):
    monkeypatch.setattr(products, "_low_product", None)
    assert all(error < FLOAT32 for error in errors(variant, "float32", "cpu").values())


def test_the_dense_product_is_made_once(monkeypatch):
    """Its result is used as it is: nothing is computed anew in float32."""
    calls = []
    monkeypatch.setattr(
        "saemill.train.sae.kernels.sparse_products_with_gradients.linear", lambda *_: calls.append("again")
    )
    gradients("standard", "bfloat16", torch.float32)
    assert not calls


def test_tf32_is_allowed_inside_only(monkeypatch):
    settings = torch.backends.cuda.matmul
    before, seen = settings.fp32_precision, []
    a = torch.ones(2, 2)
    monkeypatch.setattr(Tensor, "__matmul__", lambda *_: seen.append(settings.fp32_precision) or a)
    multiply(a, a, "tf32")
    assert seen == ["tf32"] and settings.fp32_precision == before
