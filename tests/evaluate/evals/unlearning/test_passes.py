"""The clamp's shortcut against the protocol's two decodes with an error term."""

from __future__ import annotations

import pytest
import torch

from saemill.evaluate.evals.unlearning.interventions import clamp_shift


def as_the_protocol_writes_it(x, acts, W_dec, b_dec, latents, multiplier):
    acts = acts.clone()
    acts[:, 0] = 0
    error = x - (acts @ W_dec + b_dec)
    for window, position, latent in ((w, t, f) for w, t, f in acts.nonzero().tolist() if f in latents):
        acts[window, position, latent] = -multiplier
    return acts @ W_dec + b_dec + error


@pytest.mark.parametrize("latents", [[], [3], [5, 0, 7]])
@pytest.mark.parametrize("multiplier", [25, 200.0])
def test_the_shift_is_what_two_decodes_make(latents, multiplier):
    generator = torch.Generator().manual_seed(len(latents))
    x = torch.randn(2, 4, 6, generator=generator)
    acts = torch.randn(2, 4, 8, generator=generator).relu()
    W_dec = torch.nn.functional.normalize(torch.randn(8, 6, generator=generator), dim=1)
    b_dec = torch.randn(6, generator=generator)
    expected = as_the_protocol_writes_it(x, acts, W_dec, b_dec, latents, multiplier)
    shifted = x + clamp_shift(acts[..., latents], W_dec[latents], multiplier)
    torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-3)
    lengths = torch.linspace(0.25, 4, 8)  # a foreign top-k SAE has rows of any lengths
    stretched = x + clamp_shift((acts / lengths)[..., latents], (W_dec * lengths[:, None])[latents], multiplier)
    torch.testing.assert_close(stretched, expected, rtol=1e-4, atol=1e-3)


def test_bos_and_silent_latents_stay_as_they_are():
    acts = torch.zeros(1, 3, 2)
    acts[0, 0, 0] = acts[0, 2, 1] = 4.0
    shift = clamp_shift(acts, torch.eye(2), 10)
    assert shift.tolist() == [[[0, 0], [0, 0], [0, -14]]]
    assert acts[0, 0, 0] == 4.0  # the caller's tensor is left alone
