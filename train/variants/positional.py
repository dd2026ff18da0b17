"""Positional: latents that belong to a range of positions in the window, on any base.

There are three ways, alone or combined: a mask over positions, a separate encoder for each range, and a gated
adapter for each range, before the encoder or after the features. (A part of the dictionary for each range, with its
own encoder and one shared decoder, is the same as the hard mask.) With mask=static_slicing and none of the others, it
equals its base to the bit. Otherwise the saved SAE needs the position at inference, and declares that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...cache_schema import Manifest
from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.schedules import Product, Ramp, SigmoidRamp
from ..engine.terms_and_constraints import Assembly, Term
from ..kit.check_variant_settings import (
    require,
    require_least,
    require_positive,
    require_some_latents,
    unread_unless,
    unread_where_dense,
)
from ..kit.wrapping import Windowed, base_needs, build_base
from ..sae.model import SparseAutoencoder
from ..sae.shapes.masks import (
    COEFFICIENT,
    FREE,
    HardMask,
    Mask,
    MaskKind,
    SoftMask,
    spread_over_positions,
    spread_over_ranges,
)
from ..sae.shapes.range_encoders import ADAPTER, Adapters, FeatureAdapters, RangeEncoders
from ..sae.shapes.shaped_sae import Init, PreNorm, Shape, ShapedAutoencoder, initialise, orthogonal_rows
from ..terms.position import l1_before_mask, record_of
from ..terms.reconstruction_and_sparsity import l1

SCATTER_SEEDS = 2**41  # far from the seeds of weights


@dataclass(frozen=True)
class Config(Windowed):
    own_tables: ClassVar[float] = 3.0

    ranges: int = 4
    mask: MaskKind = "hard"
    """static_slicing: no mask; latents are assigned to ranges by where they fired in training."""
    masked_share: float = 0.5
    """Share of the dictionary that is bound to ranges; the other latents fire everywhere."""
    sigma: float | None = None
    """Width of the soft mask, in tokens; None: an eighth of the window."""
    mask_cutoff: float = 0.05
    """Values of soft masks below this become 0."""
    progressive: tuple[float, float] | None = None
    """The shares of the run between which the mask rises from absent to full; None: full from the start."""
    learned_coefficient: bool = False
    """Let training move the progressive mask along its sigmoid."""
    scattered: bool = False
    """The control: each range has the same number of positions, drawn at random over the window."""
    l1_before_mask: bool = False
    pre_norm: bool = False
    """Layer norm of the pre-activations, before the mask."""
    norm_rectified: bool = False
    """Apply the norm after a ReLU, to active latents, before the mask; values that it makes negative become silent."""
    range_encoders: bool = False
    range_encoder_share: float = 0.5
    """Share of the dictionary with a separate encoder for each range."""
    independent_encoders: bool = False
    """Draw each range's encoder separately; otherwise all start as the SAE's encoder and diverge in training."""
    position_embeddings: bool = False
    """Add a learned embedding of each range to the input of the range encoders."""
    init: Init = "tied"
    adapters: bool = False
    adapters_on: Literal["input", "features"] = "input"
    adapter_hidden: int = 64
    adapter_lr_scale: float = 1.0
    adapter_from: tuple[float, float] | None = None
    """The shares of the run between which the adapters come in; None: present from the start."""
    adapted_rate: float = 1.0
    """Learning rate once the adapters are in, as a share of the rate without them."""
    unadapted_penalty: float = 1.0
    """Share of the penalty that counts before the adapters come in; it rises to the full penalty with them."""

    def unread(self) -> Mapping[str, str]:
        on_features = self.adapters and self.adapters_on == "features"
        dense = {"range_encoders": self.range_encoders, "pre_norm": self.pre_norm, "adapters_on=features": on_features}
        return {
            **super().unread(),
            **unread_where_dense(dense),
            **unread_unless("mask=soft", self.mask == "soft", "sigma", "mask_cutoff"),
            **unread_unless("mask=hard or soft", self.mask in ("hard", "soft"), "masked_share"),
            **unread_unless("range_encoders", self.range_encoders, "range_encoder_share"),
            **unread_unless("adapters", self.adapters, "adapter_hidden", "adapter_lr_scale", "adapter_from"),
        }

    def needs(self) -> Needs:
        self._require_valid()
        return replace(base_needs(self), positions=True)

    def step_tables(self) -> float:
        """Adapters on features need more tables, on a GPU one for each range."""
        return super().step_tables() + (4.0 + self.ranges if self.adapters and self.adapters_on == "features" else 0.0)

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
            assembly = assembly.with_sae(ShapedAutoencoder(sae, shapes))
        assembly = self._with_penalty(self._with_knobs(assembly))
        recorded = None if self.scattered else mask  # a scattered range is not contiguous
        return assembly.with_extra("mask", record_of(recorded, self.width, self.length, self.ranges))

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
        adapting = (self.adapter_hidden, self.length, self.ranges, self.adapter_lr_scale, generator)
        if self.adapters and self.adapters_on == "input":
            shapes["adapters"] = Adapters(sae.d_in, *adapting)
        if self.range_encoders:
            own = self._first_rows(sae, generator)
            shapes["range_encoders"] = RangeEncoders(own, self.length, self.position_embeddings)
        if self.pre_norm:
            shapes["norm"] = PreNorm(torch.zeros(self.width, dtype=torch.int64), 1, self.norm_rectified)
        if self.adapters and self.adapters_on == "features":
            shapes["adapters"] = FeatureAdapters(self.width, *adapting)
        if mask is not None:
            shapes["mask"] = mask
        return shapes

    def _first_rows(self, sae: SparseAutoencoder, generator: torch.Generator) -> Tensor:
        """[R, P, D], the ranges' initial encoders; drawn rows get the lengths of the SAE's own."""
        own = sae.W_enc.detach()[: round(self.range_encoder_share * self.width)]
        if not self.independent_encoders:
            return own.expand(self.ranges, -1, -1)
        count, width = self.ranges * len(own), own.shape[1]
        if self.init == "orthogonal":
            drawn = orthogonal_rows(count, width, generator)
        else:
            drawn = normalize(torch.randn(count, width, generator=generator), dim=1)
        return drawn.view(self.ranges, *own.shape) * own.norm(dim=1, keepdim=True)

    def _with_knobs(self, assembly: Assembly) -> Assembly:
        if self.progressive is not None:
            assembly = assembly.with_knobs(**{COEFFICIENT: SigmoidRamp(*self.progressive)})
        if self.adapter_from is not None:
            assembly = assembly.with_knobs(**{ADAPTER: Ramp(0.0, 1.0, *self.adapter_from)})
            assembly = replace(assembly, phases=Ramp(1.0, self.adapted_rate, *self.adapter_from))
        return assembly

    def _with_penalty(self, assembly: Assembly) -> Assembly:
        if not self.l1_before_mask and self.unadapted_penalty == 1.0:
            return assembly
        old = next((term for term in assembly.terms if term.fn is l1), None)
        asked = "l1_before_mask" if self.l1_before_mask else "unadapted_penalty"
        require(old is not None, f"{asked}: expected a base with an L1 penalty, found {self.base!r}")
        assert old is not None
        weight = old.weight
        if self.adapter_from is not None and self.unadapted_penalty != 1.0:
            weight = Product((weight, Ramp(self.unadapted_penalty, 1.0, *self.adapter_from)))
        return assembly.replacing(Term(old.name, l1_before_mask if self.l1_before_mask else l1, weight))

    def _require_valid(self) -> None:
        require(0 < self.ranges <= self.width, f"ranges: expected 1 to width = {self.width}, found {self.ranges}")
        require_positive(self, "masked_share", "range_encoder_share", most=1)
        if self.mask in ("hard", "soft"):
            require_some_latents("masked_share", self.masked_share, round(self.masked_share * self.width), self.width)
        if self.range_encoders:
            share = self.range_encoder_share
            require_some_latents("range_encoder_share", share, round(share * self.width), self.width)
        require_positive(self, "sigma", "adapted_rate", "adapter_lr_scale")
        require(0 <= self.mask_cutoff < 1, f"mask_cutoff: expected 0 or more and less than 1, found {self.mask_cutoff}")
        require_least(self, adapter_hidden=1, unadapted_penalty=0)
        for name in ("progressive", "adapter_from"):
            span = getattr(self, name)
            require(
                span is None or 0 <= span[0] < span[1] <= 1, f"{name}: expected 0 <= begin < end <= 1, found {span}"
            )
        masks = self.mask in ("hard", "soft")
        for name in ("progressive", "learned_coefficient", "l1_before_mask"):
            require(masks or not getattr(self, name), f"{name}: expected mask hard or soft, found {self.mask!r}")
        for name, is_set, other in (
            ("position_embeddings", self.position_embeddings, "range_encoders"),
            ("independent_encoders", self.independent_encoders, "range_encoders"),
            ("norm_rectified", self.norm_rectified, "pre_norm"),
            ("adapters_on", self.adapters_on != "input", "adapters"),
        ):
            require(not is_set or getattr(self, other), f"{name} needs {other}: set {other}=true, or leave it out")
        for name in ("adapted_rate", "unadapted_penalty"):
            phased = self.adapter_from is not None or getattr(self, name) == 1.0
            require(phased, f"{name}: expected adapter_from, found adapters that are present from the start")
        moves = self.progressive is not None or not self.learned_coefficient
        require(moves, "learned_coefficient: expected a progressive mask, found one that is full throughout")
        scatters = masks or self.range_encoders or self.adapters or not self.scattered
        require(scatters, f"scattered: expected ranges to scatter, found only mask {self.mask!r}")
        shaped = masks or self.range_encoders or self.adapters or self.mask == "static_slicing"
        require(
            shaped,
            "mask=none does nothing on its own: set hard, soft or static_slicing, or add range_encoders or adapters",
        )
