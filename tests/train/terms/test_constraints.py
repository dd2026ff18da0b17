"""Constraints against their formulas."""

from __future__ import annotations

import torch

from saemill.train.sae.gates import JumpRelu, Relu
from saemill.train.sae.model import SparseAutoencoder
from saemill.train.terms.constraints import BLOCK_ROWS, NonNegative, UnitDecoder


def test_unit_decoder_removes_what_is_parallel_and_normalises(rng):
    latents = 2 * BLOCK_ROWS + 3
    rows = torch.nn.functional.normalize(torch.randn(latents, 7, generator=rng), dim=1)
    sae = SparseAutoencoder(rows.clone(), rows.clone(), Relu())
    gradient = torch.randn(latents, 7, generator=rng)
    sae.W_dec.grad = gradient.clone()
    UnitDecoder().before_step(sae)
    expected = gradient - (gradient * rows).sum(1, keepdim=True) * rows
    torch.testing.assert_close(sae.W_dec.grad, expected)
    with torch.no_grad():
        sae.W_dec.mul_(3.0)
    UnitDecoder().after_step(sae)
    torch.testing.assert_close(sae.W_dec.detach(), rows)


def test_unit_decoder_survives_a_row_of_zeros_and_no_gradient():
    sae = SparseAutoencoder(torch.zeros(2, 3), torch.zeros(2, 3), Relu())
    UnitDecoder().before_step(sae)
    UnitDecoder().after_step(sae)
    assert bool(torch.isfinite(sae.W_dec).all())


def test_thresholds_never_fall_below_zero():
    gate = JumpRelu(3, 0.5, 0.1)
    sae = SparseAutoencoder(torch.zeros(3, 2), torch.zeros(3, 2), gate)
    gate.raw_threshold.data.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    NonNegative(("gate.raw_threshold",)).after_step(sae)
    assert gate.raw_threshold.tolist() == [0.0, 0.0, 2.0]
