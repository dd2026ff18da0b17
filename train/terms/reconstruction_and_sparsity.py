"""Reconstruction losses, also for nested prefixes of a dictionary that each reconstruct on their own, and penalties.

B rows, D width of the target, F latents, M prefixes. Codes are split by prefix, so one pass over the active latents
yields all M reconstructions. Activations grow with sqrt(D), so penalties on activity divide by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sae.gates import AnnealedRelu, JumpRelu
from ..sae.kernels.codes import Codes
from ..sae.kernels.hardware import constants
from ..sae.kernels.nested_prefixes import nested_errors
from ..sae.kernels.sparse_products_with_gradients import squared_error
from ..sae.model import rebuild
from ..sae.step_view import View, once, split


@split("parts")
def l1(view: View) -> Tensor:
    """Sum of a row's activations over sqrt(D), for decoder rows of length one."""
    return view.codes.mean_over_rows() / view.stats.width**0.5


@split("parts")
def gate_l1(view: View) -> Tensor:
    """The same sum for the codes of the gate path."""
    return gate_path(view).mean_over_rows() / view.stats.width**0.5


@once
def gate_path(view: View) -> Codes:
    """Codes of the gate path of a gated SAE: its pre-activations where they are positive."""
    pre = view.codes.pre
    assert pre is not None
    return view.codes.with_values(pre.relu())


@split("parts")
def lp(view: View) -> Tensor:
    """Sum of a row's (activation / sqrt(D))^p, rescaled as p changes."""
    gate = view.sae.gate
    assert isinstance(gate, AnnealedRelu)
    return gate.penalty_scale * gate.powers(view.codes, view.side.knob("p", 1.0))


@split("alike")
@dataclass(frozen=True)
class TargetL0:
    """(L0 / target - 1)^2, with straight-through gradients to the thresholds of a jump gate.

    The count is taken from pre-activations: gated activations would hide the window below the threshold.
    """

    target: float

    def __call__(self, view: View) -> Tensor:
        gate = view.sae.gate
        assert isinstance(gate, JumpRelu)
        count = gate.marks(view.codes).sum() / view.codes.num_rows
        # The square uses the global batch's count, the gradient only this rank's.
        others = view.side.ranks.mean(view.side.latents.sum(count.detach())) - count.detach()
        return ((count + others) / self.target - 1.0).square()


@split("parts")
@dataclass(frozen=True)
class TanhL0:
    """Sum of a row's tanh(sharpness f / sqrt(D)) over the target: a count that has a gradient to every parameter."""

    target: float
    sharpness: float

    def __call__(self, view: View) -> Tensor:
        soft = view.codes.map(lambda values: torch.tanh(values * (self.sharpness / view.stats.width**0.5)))
        return soft.mean_over_rows() / self.target


@split("parts")
@dataclass(frozen=True)
class Frequency:
    """Sum over latents of p^2 / (common target), where p is the share of rows in which a latent fires.

    A latent that fires in the share `common` of all rows costs as much as its part of the target. Gradients are
    straight-through to the thresholds of a jump gate.
    """

    target: float
    common: float

    def __call__(self, view: View) -> Tensor:
        gate, codes = view.sae.gate, view.codes
        assert isinstance(gate, JumpRelu)
        marks = gate.marks(codes)
        share_F = view.side.ranks.mean(codes.with_values(marks).latent_totals() / codes.num_rows)
        # 2 p p' - p'^2 with p' constant has the value and the gradient of p^2, but needs no gradient through totals.
        twice = 2.0 * (marks * codes.per_latent(share_F)).sum() / codes.num_rows
        return (twice - share_F.square().sum()) / (self.common * self.target)


@split("parts")
def dead_thresholds(view: View) -> Tensor:
    """Sum of the thresholds of the dead latents of a jump gate.

    The published form also moves the encoders, all dead latents' along one direction, the mean of x. At three times our
    rate and a weight that revives them, that lowered explained variance from 0.81 to 0.6 (docs/quality.md).
    """
    assert isinstance(view.sae.gate, JumpRelu)
    return (view.sae.gate.threshold * view.dead_and_wanted).sum()


@split("parts")
@dataclass(frozen=True)
class LayerNormsL1:
    """L1 of a crosscoder: each activation times the sum of its latent's decoder norms over layers."""

    num_layers: int

    def __call__(self, view: View) -> Tensor:
        W_dec, codes = view.sae.W_dec, view.codes
        norms = torch.linalg.vector_norm(W_dec.view(W_dec.shape[0], self.num_layers, -1), dim=2).sum(1)
        weighted = codes.with_values(codes.values * codes.per_latent(norms))
        return weighted.mean_over_rows() / view.stats.width**0.5


@split("alike")
def reconstruction(view: View) -> Tensor:
    """Mean of ||x - x_hat||^2 over E||x - mean||^2: the share of variance left unexplained."""
    return squared_error(view.x_hat, view.residual) / view.stats.variance


@split("alike")
def reconstruction_by_gate(view: View) -> Tensor:
    """The same through a gated SAE's gate path and a frozen decoder: trains only the gate."""
    sae = view.sae
    x_hat = rebuild(gate_path(view), sae.W_dec.detach(), sae.b_dec.detach(), view.side)
    return squared_error(x_hat, view.target - x_hat.detach()) / view.stats.variance


@split("alike")
@dataclass(frozen=True)
class NestedReconstruction:
    """Weighted sum over prefixes of the share of variance left unexplained; weights are not normalised."""

    widths: tuple[int, ...]
    weights: tuple[float, ...]

    def __call__(self, view: View) -> Tensor:
        errors, _ = self._parts(view)
        return (errors * constants(self.weights, errors)).sum() / view.stats.variance

    def residual(self, view: View) -> Tensor:
        """What the whole dictionary leaves of the target."""
        return self._parts(view)[1]

    @once
    def _parts(self, view: View) -> tuple[Tensor, Tensor]:
        """[M], mean over rows of ||x - x_hat||^2 with the first widths[m] latents; and the residual of all latents."""
        sae = view.sae
        return nested_errors(view.codes, sae.W_dec, sae.b_dec, view.target, self.widths, view.side.latents)
