"""Latents and positions: the L1 before the mask, and a record of each latent's range.

B rows, F latents, R ranges. The record is saved with the SAE. It is all that static slicing adds to a standard SAE: it
assigns each latent to the range with most of its activation.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..sae.extra_modules import DECAY, Extra
from ..sae.kernels.sparse_support import index_sum
from ..sae.shapes.masks import FREE, HardMask, Mask, SoftMask, range_of
from ..sae.shapes.range_encoders import Adapters
from ..sae.shapes.shaped_sae import ShapedAutoencoder
from ..sae.step_view import View


def l1_before_mask(view: View) -> Tensor:
    """Sum of a row's activations without the mask, over sqrt(D)."""
    assert isinstance(view.sae, ShapedAutoencoder)
    codes = view.sae.unmasked(view.x, view.side)
    return codes.mean_over_rows() / view.stats.width**0.5


class MaskRecord(Extra):
    """The range of each latent, measured if no mask defines it."""

    is_recordable = True
    range: Tensor
    num_ranges: Tensor
    mass: Tensor

    def __init__(self, range_F: Tensor, context: int, ranges: int, measured: bool) -> None:
        super().__init__()
        self.context, self.ranges, self.measured = context, ranges, measured
        self.register_buffer("range", range_F.clone())
        self.register_buffer("num_ranges", torch.tensor(ranges))
        self.register_buffer("mass", torch.zeros(ranges, range_F.numel()))

    @torch.no_grad()
    def observe(self, view: View) -> None:
        mass = view.side.ranks.sum(mass_by_range(view, self.context, self.ranges))
        self.mass.mul_(DECAY).add_(mass, alpha=1.0 - DECAY)
        if self.measured:
            self.range.copy_(torch.where(self.mass.sum(0) > 0, self.mass.argmax(0), FREE))
        view.note("mask/retention", retention(mass, self.range))
        if isinstance(view.sae, ShapedAutoencoder):
            for shape in view.sae.shapes.values():
                if isinstance(shape, Mask):
                    view.note("mask/coefficient", shape.coefficient(view.side))
                if isinstance(shape, Adapters):
                    view.note("adapter/gate", shape.gate.sigmoid().mean())


class SoftMaskRecord(MaskRecord):
    """Also records the centres of the masks, which determine the ranges."""

    centre: Tensor
    sigma: Tensor

    def __init__(self, mask: SoftMask, context: int, ranges: int) -> None:
        super().__init__(torch.full((mask.centre.numel(),), FREE), context, ranges, measured=False)
        self.register_buffer("centre", mask.centre.detach().clone())
        self.register_buffer("sigma", mask.sigma.clone())
        self.range.copy_(self._ranges(mask))

    @torch.no_grad()
    def observe(self, view: View) -> None:
        mask = cast(ShapedAutoencoder, view.sae).shapes["mask"]
        assert isinstance(mask, SoftMask)
        self.centre.copy_(mask.centre)
        self.range.copy_(self._ranges(mask))
        super().observe(view)

    def _ranges(self, mask: SoftMask) -> Tensor:
        return torch.where(mask.bound, range_of(mask.centre.detach().long(), self.context, self.ranges), FREE)


def record_of(mask: Mask | None, width: int, context: int, ranges: int) -> MaskRecord:
    """The record for a mask, or for none."""
    if isinstance(mask, SoftMask):
        return SoftMaskRecord(mask, context, ranges)
    if isinstance(mask, HardMask):
        return MaskRecord(mask.range, context, ranges, measured=False)
    return MaskRecord(torch.full((width,), FREE), context, ranges, measured=True)


def mass_by_range(view: View, context: int, ranges: int) -> Tensor:
    """[R, F], each latent's absolute activation in each range of positions, summed over rows."""
    codes = view.codes
    here = range_of(view.side["position"], context, ranges)
    values = codes.values.detach().abs()
    if codes.support is None:
        return index_sum(values, here, ranges)
    flat = here[codes.support.rows] * codes.num_latents + codes.support.latents
    return index_sum(values, flat, ranges * codes.num_latents).view(ranges, -1)


def retention(mass_RF: Tensor, range_F: Tensor) -> Tensor:
    """Mean share of activation inside the range, over latents that have a range; 1 if none has."""
    total_F = mass_RF.sum(0)
    bound = (range_F != FREE) & (total_F > 0)
    inside_F = mass_RF.gather(0, range_F.clamp_min(0)[None])[0]
    count = bound.sum()
    return torch.where(count > 0, torch.where(bound, inside_F / total_F, 0.0).sum() / count, 1.0)
