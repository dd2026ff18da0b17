"""Faults found in other trainers, each one a test here. (Those of stores and runs are tested there.)"""

from __future__ import annotations

import torch

from saemill.train.data.scaling import unit_stats
from saemill.train.engine.step import Trainee
from saemill.train.sae.gates import BatchTopK, JumpRelu
from saemill.train.sae.model import SparseAutoencoder, tied_weights
from saemill.train.sae.side_inputs import Side
from saemill.train.sae.step_view import View
from saemill.train.terms.auxk import AuxK
from saemill.train.terms.reconstruction import NestedReconstruction
from saemill.train.terms.sparsity import TargetL0
from saemill.train.variants.topk import Config

D, LATENTS = 8, 24


def view_of(sae: SparseAutoencoder, x: torch.Tensor, dead: torch.Tensor) -> View:
    return View(x, x, Side(), sae, dead, unit_stats(D), torch.Generator())


def test_the_auxiliary_gradient_reaches_the_encoder(rng):
    trainee = Trainee("one", Config(width=LATENTS, k=2, dead_after_tokens=1, aux_weight=1.0).build(D), 10)
    trainee.counters.tokens_since_fired[5] = 10
    view = view_of(trainee.sae, torch.randn(64, D, generator=rng), trainee.counters.dead(10))
    AuxK(4)(view).backward()
    gradient = trainee.sae.W_enc.grad
    assert gradient is not None
    assert float(gradient[5].abs().sum()) > 0
    assert float(gradient[torch.arange(LATENTS) != 5].abs().sum()) == 0.0


def test_the_l0_window_sees_pre_activations_below_the_threshold():
    # One row just below the threshold: the gated activation is zero, the derivative is not.
    gate = JumpRelu(1, 1.0, 0.5)
    sae = SparseAutoencoder(torch.ones(1, 1), torch.ones(1, 1), gate)
    x = torch.tensor([[0.9]])
    view = View(x, x, Side(), sae, torch.zeros(1, dtype=torch.bool), unit_stats(1), torch.Generator())
    TargetL0(1.0)(view).backward()
    # d (count - 1)^2 / d theta = 2 (0 - 1) * (-1 / 0.5) = 4
    assert gate.raw_threshold.grad is not None
    assert float(gate.raw_threshold.grad) == 4.0


def test_the_weight_of_a_prefix_counts_once(rng):
    sae = SparseAutoencoder(*tied_weights(LATENTS, D, rng), BatchTopK(3))
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    x = torch.randn(64, D, generator=rng)
    alone = float(NestedReconstruction((LATENTS,), (1.0,))(view_of(sae, x, dead)).detach())
    both = float(NestedReconstruction((6, LATENTS), (0.0, 0.5))(view_of(sae, x, dead)).detach())
    assert abs(both - 0.5 * alone) < 1e-6 * alone


def test_the_auxiliary_target_is_free_of_the_decoder_bias(rng):
    # Dead latents that already write the residual exactly leave nothing over, whatever the bias is.
    W = torch.eye(4)
    sae = SparseAutoencoder(W.clone(), W.clone(), BatchTopK(0.5), b_dec=torch.tensor([5.0, -3.0, 2.0, 1.0]))
    x = sae.b_dec.detach() + torch.rand(32, 4, generator=rng) * torch.tensor([10.0, 1.0, 1.0, 1.0])
    dead = torch.tensor([False, True, True, True])
    with torch.no_grad():
        left = (x - sae.b_dec) * dead  # by the living latent
        view = View(x, x, Side(), sae, dead, unit_stats(4), torch.Generator(), residual_by=lambda _: left)
        assert float(AuxK(4)(view)) < 1e-10
