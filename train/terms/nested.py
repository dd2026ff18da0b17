"""Nested prefixes of one dictionary, each reconstructing on its own.

B rows, D width, F latents, M prefixes. Codes are split by prefix, so one pass over the active
latents yields all M reconstructions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..sae.kernels.hardware import numbers
from ..sae.kernels.nested import nested_errors
from ..sae.step_view import View, once


@dataclass(frozen=True)
class NestedReconstruction:
    """Weighted sum over prefixes of the share of variance left unexplained; each weight counts once."""

    widths: tuple[int, ...]
    weights: tuple[float, ...]

    def __call__(self, view: View) -> Tensor:
        errors, _ = self._parts(view)
        return (errors * numbers(self.weights, errors)).sum() / view.stats.variance

    def residual(self, view: View) -> Tensor:
        """What the whole dictionary leaves of the target."""
        return self._parts(view)[1]

    @once
    def _parts(self, view: View) -> tuple[Tensor, Tensor]:
        """[M], mean over rows of ||x - x_hat||^2 with the first widths[m] latents; the residual of all."""
        return nested_errors(view.codes, view.sae.W_dec, view.sae.b_dec, view.target, self.widths)
