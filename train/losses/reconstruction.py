"""How far the reconstruction is from its target."""

from __future__ import annotations

from torch import Tensor

from ..compose import View
from ..sae.kernels.functions import squared_error


def reconstruction(view: View) -> Tensor:
    """Mean of ||x - x_hat||^2 over E||x - mean||^2: the share of variance left unexplained."""
    return squared_error(view.x_hat, view.residual) / view.stats.variance
