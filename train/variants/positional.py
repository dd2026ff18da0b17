"""Positional: latents that belong to a range of positions in the window, on any base.

Three ways, each alone or together: a mask over positions, encoders of their own for each range, and a gated
adapter for each range in front of the encoder. With none of them, and static_slicing, it is its base to
the bit. All but that need the position at inference, and the saved SAE says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...cache_schema import Manifest
from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.compose import Assembly, Term
from ..engine.schedules import Ramp, SigmoidRamp
from ..kit.build import require, require_least
from ..kit.wrapping import Windowed, base_request, build_base
from ..sae.first_weights import Init, initialise
from ..sae.model import SparseAutoencoder
from ..sae.shapes.masks import COEFFICIENT, HardMask, Mask, MaskKind, SoftMask
from ..sae.shapes.norms import PreNorm
from ..sae.shapes.range_encoders import ADAPTER, Adapters, RangeEncoders
from ..sae.shapes.ranges import FREE, spread_over_positions, spread_over_ranges
from ..sae.shapes.shaped import Shape, ShapedAutoencoder
from ..terms.position import l1_before_mask, record_of
from ..terms.sparsity import l1

SCATTER_SEEDS = 2**41  # far from those of weights


@dataclass(frozen=True)
class Config(Windowed):
    own_tables: ClassVar[float] = 3.0

    ranges: int = 4
    mask: MaskKind = "hard"
    """static_slicing: no mask, latents are assigned to ranges by what they did in training."""
    masked_share: float = 0.5
    """Share of the dictionary that has a range; the others fire everywhere."""
    sigma: float | None = None
    """Of the soft mask, in tokens; None: an eighth of the window."""
    mask_cutoff: float = 0.05
    """Soft masks below this are 0."""
    progressive: tuple[float, float] | None = None
    """Between which shares of the run the mask goes from absent to full; None: full from the start."""
    learned_coefficient: bool = False
    """Let training move the progressive mask along its sigmoid."""
    scattered: bool = False
    """The control: each range has as many positions as before, drawn at random over the window."""
    l1_before_mask: bool = False
    pre_norm: bool = False
    """Layer norm of the pre-activations, before the mask."""
    range_encoders: bool = False
    range_encoder_share: float = 0.5
    """Share of the dictionary with an encoder for each range."""
    position_embeddings: bool = False
    """Learned, one for each range, added to the range encoders' input."""
    init: Init = "tied"
    adapters: bool = False
    adapter_hidden: int = 64
    adapter_lr_scale: float = 1.0
    adapter_from: tuple[float, float] | None = None
    """Between which shares of the run the adapters come in; None: they are there from the start."""

    def request(self) -> Needs:
        self._require_valid()
        return replace(base_request(self), positions=True)

    def check(self, manifest: Manifest) -> None:
        super().check(manifest)
        require(
            manifest.context % self.ranges == 0,
            f"ranges: expected a number that divides the store's windows of {manifest.context} tokens, "
            f"found {self.ranges}",
        )

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        self._require_valid()
        assembly = build_base(self, d_model, stats)
        sae, generator = assembly.sae, assembly.generator
        initialise(sae, self.init, generator, self.optim.start == "fitted")
        mask = self._mask(self.length)
        shapes = self._shapes(sae, mask, generator)
        if self.scattered:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(SCATTER_SEEDS + self.seed))
            for shape in shapes.values():
                shape.scatter(order)
        if shapes:
            assembly = assembly.wrap(lambda inner: ShapedAutoencoder(inner, shapes))
        assembly = self._with_penalty(self._with_knobs(assembly))
        known = None if self.scattered else mask  # a scattered range is no part of the window
        return assembly.with_extra("mask", record_of(known, self.width, self.length, self.ranges))

    def _mask(self, context: int) -> Mask | None:
        if self.mask == "hard":
            owner = spread_over_ranges(self.width, self.ranges, self.masked_share)
            return HardMask(owner, context, self.ranges, self.learned_coefficient)
        if self.mask == "soft":
            bound = spread_over_ranges(self.width, self.ranges, self.masked_share) != FREE
            centre = spread_over_positions(self.width, context, self.masked_share)
            return SoftMask(bound, centre, self.sigma or context / 8, self.mask_cutoff, self.learned_coefficient)
        return None

    def _shapes(self, sae: SparseAutoencoder, mask: Mask | None, generator: torch.Generator) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        if self.adapters:
            shapes["adapters"] = Adapters(
                sae.d_in, self.adapter_hidden, self.length, self.ranges, self.adapter_lr_scale, generator
            )
        if self.range_encoders:
            own = sae.W_enc.detach()[: round(self.range_encoder_share * self.width)]
            shapes["range_encoders"] = RangeEncoders(own, self.length, self.ranges, self.position_embeddings)
        if self.pre_norm:
            shapes["norm"] = PreNorm(torch.zeros(self.width, dtype=torch.int64), 1)
        if mask is not None:
            shapes["mask"] = mask
        return shapes

    def _with_knobs(self, assembly: Assembly) -> Assembly:
        if self.progressive is not None:
            assembly = assembly.with_knobs(**{COEFFICIENT: SigmoidRamp(*self.progressive)})
        if self.adapter_from is not None:
            begin, end = self.adapter_from
            assembly = assembly.with_knobs(**{ADAPTER: Ramp(0.0, 1.0, begin, end)})
        return assembly

    def _with_penalty(self, assembly: Assembly) -> Assembly:
        if not self.l1_before_mask:
            return assembly
        old = next((term for term in assembly.terms if term.fn is l1), None)
        require(old is not None, f"l1_before_mask: expected a base with an L1 penalty, found {self.base!r}")
        assert old is not None
        return assembly.replacing(Term(old.name, l1_before_mask, old.weight))

    def _require_valid(self) -> None:
        require(0 < self.ranges <= self.width, f"ranges: expected 1 to width = {self.width}, found {self.ranges}")
        for name in ("masked_share", "range_encoder_share"):
            require(0 < getattr(self, name) <= 1, f"{name}: expected more than 0 and at most 1")
        require(self.sigma is None or self.sigma > 0, f"sigma: expected a positive number, found {self.sigma}")
        require(0 <= self.mask_cutoff < 1, f"mask_cutoff: expected 0 to 1, found {self.mask_cutoff}")
        require_least(self, adapter_hidden=1)
        for name in ("progressive", "adapter_from"):
            span = getattr(self, name)
            require(
                span is None or 0 <= span[0] < span[1] <= 1, f"{name}: expected 0 <= begin < end <= 1, found {span}"
            )
        masks = self.mask in ("hard", "soft")
        for name in ("progressive", "learned_coefficient", "l1_before_mask"):
            require(masks or not getattr(self, name), f"{name}: expected mask hard or soft, found {self.mask!r}")
        embeds = self.range_encoders or not self.position_embeddings
        require(embeds, "position_embeddings: expected range_encoders to read them, found none")
        moves = self.progressive is not None or not self.learned_coefficient
        require(moves, "learned_coefficient: expected a progressive mask to move, found one that is full throughout")
        scatters = masks or self.range_encoders or self.adapters or not self.scattered
        require(scatters, f"scattered: expected ranges to scatter, found mask {self.mask!r} alone")
        shaped = masks or self.range_encoders or self.adapters or self.mask == "static_slicing"
        require(shaped, "mask: expected hard, soft, static_slicing, or range_encoders or adapters beside none")
