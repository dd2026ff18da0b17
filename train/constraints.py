"""Constraints on the weights, one frozen record each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sae.model import SparseAutoencoder


@dataclass(frozen=True)
class UnitDecoder:
    """Decoder rows of length one.

    Before the step the part of each row's gradient that points along the row is removed, so that
    Adam's moments do not gather what the normalisation would undo.
    """

    @torch.no_grad()
    def before_step(self, sae: SparseAutoencoder) -> None:
        gradient = sae.W_dec.grad
        if gradient is not None:
            gradient.addcmul_(sae.W_dec, _row_dots(sae.W_dec, gradient)[:, None], value=-1.0)

    @torch.no_grad()
    def after_step(self, sae: SparseAutoencoder) -> None:
        norms = torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True)
        sae.W_dec.div_(norms.clamp_min(1e-12))


@dataclass(frozen=True)
class NonNegativeThreshold:
    """A jump threshold never falls below zero."""

    def before_step(self, sae: SparseAutoencoder) -> None:
        pass

    @torch.no_grad()
    def after_step(self, sae: SparseAutoencoder) -> None:
        threshold = getattr(sae.gate, "threshold")  # noqa: B009
        threshold.clamp_min_(0.0)


def _row_dots(left: Tensor, right: Tensor) -> Tensor:
    """[F] dot products of rows, without an intermediate table."""
    return torch.bmm(left[:, None, :], right[:, :, None]).view(-1)
