"""How far the reconstruction is from its target."""

from __future__ import annotations

from torch import Tensor

from ..sae.kernels.functions import squared_error
from ..sae.model import rebuild
from ..sae.step_view import View, split
from .sparsity import gate_path


@split("alike")
def reconstruction(view: View) -> Tensor:
    """Mean of ||x - x_hat||^2 over E||x - mean||^2: the share of variance left unexplained."""
    return squared_error(view.x_hat, view.residual) / view.stats.variance


@split("alike")
def reconstruction_by_gate(view: View) -> Tensor:
    """The same through a gated SAE's gate path and a frozen decoder: trains the gate alone."""
    sae = view.sae
    x_hat = rebuild(gate_path(view), sae.W_dec.detach(), sae.b_dec.detach(), view.side)
    return squared_error(x_hat, view.target - x_hat.detach()) / view.stats.variance
