"""What depends on the machine: where bfloat16 is slow it is not used, and the allocator can be asked anywhere."""

from __future__ import annotations

import pytest
import torch

from saemill.train.sae.gates import TopK
from saemill.train.sae.kernels import hardware
from saemill.train.sae.kernels.hardware import has_fast_bfloat16, has_triton
from saemill.train.sae.kernels.triton import exact_top_k
from saemill.train.sae.model import SparseAutoencoder


def test_the_bfloat16_product_gives_way_where_it_is_emulated(rng, monkeypatch):
    W = torch.randn(16, 8, generator=rng)
    sae = SparseAutoencoder(W, W.clone(), TopK(2), encoder_product="bfloat16")
    x = torch.randn(4, 8, generator=rng)
    dtypes = []
    monkeypatch.setattr(sae.gate, "choose", lambda pre, side: dtypes.append(pre.dtype))
    for fast in (True, False):
        monkeypatch.setattr(
            "saemill.train.sae.kernels.dense_products.has_fast_bfloat16", lambda device_type, fast=fast: fast
        )
        sae.codes(x)
    assert dtypes == [torch.bfloat16, torch.float32]


def test_an_unknown_device_has_no_fast_bfloat16():
    assert not has_fast_bfloat16("meta")


@pytest.fixture
def asked_anew():
    has_triton.cache_clear()
    yield
    has_triton.cache_clear()


def test_a_machine_without_triton_says_so_and_uses_torch(asked_anew, monkeypatch):
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="cpu: triton is not installed; steps here use torch's own kernels"):
        assert not has_triton(torch.device("cpu"))


def test_a_device_that_triton_cannot_compile_for_uses_torch(asked_anew, monkeypatch):
    def refuse(pre, k):
        raise error

    error = RuntimeError("Failed to find C compiler.\nPlease specify via CC.")
    monkeypatch.setattr(exact_top_k, "top_latents", refuse)
    with pytest.warns(UserWarning, match=r"cannot compile for it \(RuntimeError: Failed to find C compiler.\)"):
        assert not has_triton(torch.device("cpu"))
    has_triton.cache_clear()
    error = AssertionError()  # some say nothing at all
    with pytest.warns(UserWarning, match=r"cannot compile for it \(AssertionError: \)"):
        assert not has_triton(torch.device("cpu"))
