"""Nested prefixes of one dictionary, each reconstructing on its own.

B rows, D width, F latents, M prefixes. Codes are split by prefix, so one pass over the active
latents yields all M reconstructions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..sae.kernels.nested import nested_errors
from ..sae.view import View


def prefix_errors(view: View, widths: tuple[int, ...]) -> Tensor:
    """[M], mean over rows of ||x - x_hat||^2 with the first widths[m] latents."""
    sae = view.sae
    errors, residual = nested_errors(view.codes, sae.W_dec, sae.b_dec, view.target, widths)
    view.once("residual", lambda: residual)
    return errors


@dataclass(frozen=True)
class NestedReconstruction:
    """Weighted sum over prefixes of the share of variance left unexplained; each weight counts once."""

    widths: tuple[int, ...]
    weights: tuple[float, ...]

    def __call__(self, view: View) -> Tensor:
        errors = prefix_errors(view, self.widths)
        return (errors * errors.new_tensor(self.weights)).sum() / view.stats.variance
