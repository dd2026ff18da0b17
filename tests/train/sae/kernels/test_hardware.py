"""What depends on the machine: where bfloat16 is slow it is not used, and the allocator can be asked anywhere."""

from __future__ import annotations

import torch

from saemill.train.sae.gates import TopK
from saemill.train.sae.kernels.hardware import has_fast_bfloat16
from saemill.train.sae.model import SparseAutoencoder


def test_the_bfloat16_product_gives_way_where_it_is_emulated(rng, monkeypatch):
    W = torch.randn(16, 8, generator=rng)
    sae = SparseAutoencoder(W, W.clone(), TopK(2), encoder_product="bfloat16")
    x = torch.randn(4, 8, generator=rng)
    dtypes = []
    monkeypatch.setattr(sae.gate, "choose", lambda pre, side: dtypes.append(pre.dtype))
    for fast in (True, False):
        monkeypatch.setattr("saemill.train.sae.model.has_fast_bfloat16", lambda device_type, fast=fast: fast)
        sae.codes(x)
    assert dtypes == [torch.bfloat16, torch.float32]


def test_an_unknown_device_has_no_fast_bfloat16():
    assert not has_fast_bfloat16("meta")
