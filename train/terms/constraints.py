"""Constraints on the weights, one frozen record each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine.compose import TableUse
from ..sae.cross_layer import CrossLayerSae
from ..sae.gates import JumpRelu
from ..sae.model import SparseAutoencoder

BLOCK_ROWS = 256


@dataclass(frozen=True)
class UnitDecoder:
    """Decoder rows of length one.

    Before the step the part of each row's gradient that points along the row is removed, so that
    Adam's moments do not gather what the normalisation would undo. An optimiser that works row by row does
    both by itself, and then leaves this constraint out.
    """

    table_use: ClassVar[TableUse] = "unit decoder"

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
class NonNegativeThreshold:
    """A jump threshold never falls below zero."""

    table_use: ClassVar[TableUse] = "none"

    def before_step(self, sae: SparseAutoencoder) -> None:
        pass

    @torch.no_grad()
    def after_step(self, sae: SparseAutoencoder) -> None:
        assert isinstance(sae.gate, JumpRelu)
        sae.gate.raw_threshold.clamp_min_(0.0)


@dataclass(frozen=True)
class Still:
    """Parameters that keep their first values."""

    names: tuple[str, ...]
    table_use: ClassVar[TableUse] = "gradients"

    def before_step(self, sae: SparseAutoencoder) -> None:
        for name in self.names:
            gradient = sae.get_parameter(name).grad
            if gradient is not None:
                gradient.zero_()  # from the first step on, so that Adam never moves it

    def after_step(self, sae: SparseAutoencoder) -> None:
        pass


@dataclass(frozen=True)
class WritesOnward:
    """No latent writes to a layer before its own, where it begins at zero."""

    table_use: ClassVar[TableUse] = "gradients"

    def before_step(self, sae: SparseAutoencoder) -> None:
        assert isinstance(sae, CrossLayerSae)
        if sae.W_dec.grad is not None:
            layer = torch.arange(sae.num_layers, device=sae.W_dec.device)
            sae.W_dec.grad.unflatten(1, (sae.num_layers, -1)).mul_((layer >= sae.layer_of[:, None])[:, :, None])

    def after_step(self, sae: SparseAutoencoder) -> None:
        pass


def _blocks(table: Tensor) -> tuple[Tensor, ...]:
    """The table in runs of rows that stay in cache between two passes."""
    return table.split(BLOCK_ROWS if table.device.type == "cpu" else table.shape[0])
