"""Constraints on weights and on their gradients, one frozen record each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.device_copies import refuse_recording
from ..engine.terms_and_constraints import Constraint
from ..sae.kernels.hardware import reads_at_once
from ..sae.kernels.sparse_support import index_sum
from ..sae.model import SparseAutoencoder
from .tiers import TIERS, Tiers

BLOCK_ROWS = 256


@dataclass(frozen=True)
class UnitDecoder(Constraint):
    """Keep decoder rows at length one.

    Before the step the component of each row's gradient along the row is removed, so that Adam's moments do not
    accumulate what the normalisation would undo. Left out where an optimiser that works row by row does both itself.
    """

    table_use = "unit decoder"

    @torch.no_grad()
    def before_step(self, sae: SparseAutoencoder) -> None:
        if sae.W_dec.grad is None:
            return
        for rows, gradient in zip(_blocks(sae.W_dec), _blocks(sae.W_dec.grad), strict=True):
            gradient.addcmul_(rows, torch.linalg.vecdot(rows, gradient)[:, None], value=-1.0)

    @torch.no_grad()
    def after_step(self, sae: SparseAutoencoder) -> None:
        for rows in _blocks(sae.W_dec):
            rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(1e-12))


@dataclass(frozen=True)
class NonNegative(Constraint):
    """Keep parameters, other than weight tables, from falling below zero."""

    names: tuple[str, ...]
    table_use = "none"

    @torch.no_grad()
    def after_step(self, sae: SparseAutoencoder) -> None:
        for name in self.names:
            sae.get_parameter(name).clamp_min_(0.0)


@dataclass(frozen=True)
class Still(Constraint):
    """Keep parameters at their initial values."""

    names: tuple[str, ...]
    table_use = "gradients"

    def before_step(self, sae: SparseAutoencoder) -> None:
        for name in self.names:
            sae.get_parameter(name).grad = None  # without a gradient it is neither moved nor decayed


@dataclass(frozen=True)
class WritesOnward(Constraint):
    """Keep latents from writing to layers before their own: those parts of their rows stay zero."""

    table_use = "gradients"

    def before_step(self, sae: SparseAutoencoder) -> None:
        if sae.W_dec.grad is not None:
            sae.clear_unwritten(sae.W_dec.grad)


def _blocks(table: Tensor) -> tuple[Tensor, ...]:
    """The table in blocks of rows that stay in a CPU's cache between two passes."""
    return table.split(BLOCK_ROWS if table.device.type == "cpu" else table.shape[0])


@dataclass(frozen=True)
class TierGradients(Constraint):
    """Log each tier's gradient norm (encoder, encoder bias, decoder), and scale it down to `clip_norm` if larger."""

    table_use = "gradients"

    clip_norm: float | None = None

    @torch.no_grad()
    def before_step(self, sae: SparseAutoencoder) -> None:
        tiers = sae.extras[TIERS]
        assert isinstance(tiers, Tiers)
        tables = [table.grad for table in (sae.W_enc, sae.b_enc, sae.W_dec) if table.grad is not None]
        squares_F = sum(table.square() if table.ndim == 1 else torch.linalg.vecdot(table, table) for table in tables)
        assert isinstance(squares_F, Tensor)
        tiers.notes_grad_norm = True
        tiers.grad_norm.copy_(index_sum(squares_F, tiers.membership, tiers.num_tiers).sqrt())
        if self.clip_norm is None:
            return
        factor_F = (self.clip_norm / tiers.grad_norm.clamp_min(1e-30)).clamp_max(1.0)[tiers.membership]
        for table in tables:
            table.mul_(factor_F if table.ndim == 1 else factor_F[:, None])


@dataclass(frozen=True, eq=False)
class GradientNoise(Constraint):
    """Add normal noise of `scale` times the root mean square of each gradient, so that it fades with the gradients."""

    table_use = "gradients"

    scale: float
    generator: torch.Generator  # the SAE's own: its state is saved with the rest

    @torch.no_grad()
    def before_step(self, sae: SparseAutoencoder) -> None:
        for parameter in sae.parameters():
            if parameter.grad is None:
                continue
            noise = self._noise(parameter)
            size = parameter.grad.square().mean().sqrt()
            parameter.grad.add_(noise * size, alpha=self.scale)

    def _noise(self, parameter: Tensor) -> Tensor:
        """A GPU draws its own, from a seed of the SAE's generator: the host would have to wait for a copied table."""
        if reads_at_once(parameter):
            return torch.randn(parameter.shape, generator=self.generator).to(parameter)
        refuse_recording("it draws a seed on the host")
        seed = int(torch.randint(2**62, (), generator=self.generator))
        own = torch.Generator(parameter.device).manual_seed(seed)
        return torch.randn(parameter.shape, generator=own, device=parameter.device, dtype=parameter.dtype)
