"""Reconstruction losses, also for nested prefixes of one dictionary that each reconstruct on their own.

B rows, D width, F latents, M prefixes. Codes are split by prefix, so one pass over the active
latents yields all M reconstructions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..sae.kernels.hardware import constants
from ..sae.kernels.nested_prefixes import nested_errors
from ..sae.kernels.sparse_products_with_gradients import squared_error
from ..sae.model import rebuild
from ..sae.step_view import View, once, split
from .sparsity import gate_path


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
