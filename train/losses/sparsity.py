"""What activity costs. D width of the target; activations grow with sqrt(D), so penalties divide by it."""

from __future__ import annotations

from torch import Tensor

from ..compose import View


def l1(view: View) -> Tensor:
    """Sum of a row's activations over sqrt(D), for decoder rows of length one."""
    return view.codes.mean_over_rows() / view.stats.width**0.5
