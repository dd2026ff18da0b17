"""An SAE whose path from x to its codes is changed by small modules: masks, gates, adapters, norms.

B rows, F latents, G groups. A `Shape` may change four things, none by default:
1. `adapt`: the input;
2. `make_pre`: how pre-activations are computed (they are then dense, with a dense backward pass);
3. `change_pre`: dense pre-activations, once computed (a norm);
4. `factor`: a non-negative factor of each activation.
The factor multiplies pre-activations, before the gate: for relu and top-k gates that is the same as after it, the k
are chosen among what is left, and thresholds (of a jump, of a batch top-k) mean the same in training and at inference.
Only a gated SAE, whose magnitude has a bias, is multiplied after its gate. If all factors are 1, the codes are those of
the plain SAE to the bit.

Instead of random rows, initial weights may be Xavier's uniform ones, or rows of orthogonal blocks, D wide. Decoder rows
have length one in any case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..extra_modules import Part
from ..gates import Gated, JumpRelu
from ..kernels.codes import Codes, codes_from_dense
from ..kernels.dense_products import linear
from ..kernels.sparse_support import Support
from ..model import Choose, SparseAutoencoder
from ..side_inputs import NO_SIDE, Side

EPSILON = 1e-5


class Shape(Part):
    """Base class of shapes."""

    is_plain = False
    """Whether it has no effect at inference."""
    needs_side: tuple[str, ...] = ()
    makes_pre = False
    changes_pre = False
    sets_scale = False
    """Whether changed pre-activations have a scale and an offset of their own."""
    has_factor = False
    order: Tensor | None  # [T], the position that each position is read as

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", None)

    def scatter(self, order_T: Tensor) -> None:
        """Read positions in another order."""
        self.order = order_T.clone()

    def position(self, side: Side) -> Tensor:
        """int64 [B]."""
        position: Tensor = side["position"]
        return position if self.order is None else self.order[position]

    def adapt(self, x: Tensor, side: Side) -> Tensor:
        return x

    def make_pre(self, sae: SparseAutoencoder, x_centred: Tensor, side: Side, latents: Tensor | None) -> Tensor:
        """Pre-activations of all latents, or of some, with gradient only to the encoders of those."""
        raise NotImplementedError

    def change_pre(self, pre: Tensor, side: Side) -> Tensor:
        return pre

    def factor(self, codes: Codes, side: Side, latents: Tensor | None = None) -> Tensor:
        """Factors in the shape of the codes' values; `latents` are those of the columns, if not all."""
        raise NotImplementedError

    def lower(self, amount: float) -> None:
        """For shapes that set the scale: subtract this much from the output."""
        raise NotImplementedError

    def rescale(self, factor: float) -> None:
        """Multiply the output by this factor, if it does not scale with the SAE's own weights."""

    def follow(self, membership_F: Tensor) -> None:
        """Adapt after latents have changed groups."""


class PreNorm(Shape):
    """Layer norm of pre-activations within the groups of latents given by `group_F`: between tiers, or before a mask.

    Each row's pre-activations of a group are centred and scaled to variance one; then each latent's own gain and bias
    apply. Codes lose the information in a row's size, so this is for comparison, not a default.
    """

    changes_pre = True
    sets_scale = True
    group: Tensor

    def __init__(self, group_F: Tensor, num_groups: int, rectifies: bool = False) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.rectifies = rectifies
        """Whether to normalise after a ReLU: the norm then ignores differences among latents that do not fire."""
        self.register_buffer("group", group_F.clone())
        self.gain = nn.Parameter(torch.ones(group_F.numel()))
        self.bias = nn.Parameter(torch.zeros(group_F.numel()))

    def change_pre(self, pre: Tensor, side: Side) -> Tensor:
        groups = torch.arange(self.num_groups, device=pre.device)
        member_FG = (self.group[:, None] == groups).to(pre.dtype)
        share_FG = member_FG / member_FG.sum(0).clamp_min(1.0)
        pre = pre.relu() if self.rectifies else pre
        centred = pre - (pre @ share_FG) @ member_FG.t()
        variance = (centred.square() @ share_FG) @ member_FG.t()
        return centred * (variance + EPSILON).rsqrt() * self.gain + self.bias

    def lower(self, amount: float) -> None:
        self.bias.sub_(amount)

    def rescale(self, factor: float) -> None:
        self.gain.mul_(factor)
        self.bias.mul_(factor)

    def follow(self, membership_F: Tensor) -> None:
        self.group.copy_(membership_F)


class ShapedAutoencoder(SparseAutoencoder):
    """The weights and gate of the SAE `inner`, with shapes by name, applied in order."""

    def __init__(self, inner: SparseAutoencoder, shapes: Mapping[str, Shape]) -> None:
        super().__init__(**inner.parts())
        self.shapes = nn.ModuleDict(shapes)
        self.is_plain = self.is_plain and all(shape.is_plain for shape in shapes.values())
        self.needs_side = tuple(dict.fromkeys(name for shape in shapes.values() for name in shape.needs_side))

    def pre_codes(self, x: Tensor, side: Side = NO_SIDE, choose: Choose | None = None) -> Codes:
        x = self._adapted(x, side)
        if not self._is_dense():
            return super().pre_codes(x, side, choose)
        pre = self._dense_pre(x, side)
        with torch.no_grad():
            support = (choose or self.choose)(pre, side)
        codes = codes_from_dense(pre, support)
        return replace(codes, pre=codes.values)

    def encoder_input(self, x: Tensor, side: Side) -> Tensor:
        return super().encoder_input(self._adapted(x, side), side)

    def pre_of_latents(self, x: Tensor, side: Side, latents: Tensor, learns: Tensor | None) -> Tensor | None:
        if not self._is_dense():
            return None
        with torch.no_grad():
            x_centred = self.encoder_input(x, side)
        pre = self._unchanged_pre(x_centred, side, latents)
        pre = pre if learns is None else torch.where(learns, pre, pre.detach())
        if not any(shape.changes_pre for shape in self._shapes()):
            return pre
        with torch.no_grad():
            pre_all = self._unchanged_pre(x_centred, side)
        return self._changed_pre(pre_all.index_copy(1, latents, pre), side)[:, latents]

    def choose(self, pre_all: Tensor, side: Side) -> Support | None:
        factor = self._factor(codes_from_dense(pre_all, None), side)
        if factor is None:
            return super().choose(pre_all, side)
        # A closed latent is never chosen, even if nothing else is above zero; among signed codes zero comes last.
        closed = -math.inf if self.gate.can_lower else 0.0
        return super().choose(torch.where(factor > 0, pre_all * factor, closed), side)

    def open(self, pre: Codes, side: Side) -> Codes:
        factor = self._factor(pre, side)
        if factor is None:
            return super().open(pre, side)
        if isinstance(self.gate, Gated):
            opened, seen = super().open(pre, side), torch.where(factor > 0, pre.values, 0.0)
            return replace(opened, values=opened.values * factor, pre=seen)  # its gate path does not see closed ones
        values = pre.values * factor
        if isinstance(self.gate, JumpRelu):  # a closed latent's 0 may be in its threshold's window
            values = torch.where(factor > 0, values, -math.inf)
        return super().open(replace(pre, values=values, pre=values), side)

    def with_factors(self, codes: Codes, side: Side, latents: Tensor) -> Codes:
        factor = self._factor(codes, side, latents)
        return codes if factor is None else codes.with_values(codes.values * factor)

    def unmasked(self, x: Tensor, side: Side) -> Codes:
        """The codes without any factor."""
        return self.gate.open(self.pre_codes(x, side, self.gate.choose), self.b_enc, side)

    def follow(self, membership_F: Tensor) -> None:
        """Adapt after latents have changed groups."""
        for shape in self._shapes():
            shape.follow(membership_F)

    def lower(self, amount: float) -> None:
        last = next((shape for shape in reversed(self._shapes()) if shape.sets_scale), None)
        if last is None:
            super().lower(amount)
        else:
            last.lower(amount)
            self.gate.lower(amount)

    def rescale(self, factor: float) -> None:
        if not any(shape.sets_scale for shape in self._shapes()):
            super().rescale(factor)
        else:
            self.gate.rescale(factor)
        for shape in self._shapes():
            shape.rescale(factor)

    def encode(self, x: Tensor, side: Side = NO_SIDE) -> Tensor:
        if self.is_plain:
            return super().encode(x, side)
        pre = self._dense_pre(self._adapted(x, side), side)
        factor = self._factor(codes_from_dense(pre, None), side)
        if factor is None:
            return self.gate.infer(pre, self.b_enc)
        if isinstance(self.gate, Gated):
            return self.gate.infer(pre, self.b_enc) * factor
        return self.gate.infer(pre * factor, self.b_enc)

    def _shapes(self) -> list[Shape]:
        return [cast(Shape, shape) for shape in self.shapes.values()]

    def _adapted(self, x: Tensor, side: Side) -> Tensor:
        for shape in self._shapes():
            x = shape.adapt(x, side)
        return x

    def _dense_pre(self, x: Tensor, side: Side) -> Tensor:
        """All pre-activations in float32, with gradient."""
        return self._changed_pre(self._unchanged_pre(self.centred(x), side), side)

    def _is_dense(self) -> bool:
        return any(shape.makes_pre or shape.changes_pre for shape in self._shapes())

    def _unchanged_pre(self, x_centred: Tensor, side: Side, latents: Tensor | None = None) -> Tensor:
        makers = [shape for shape in self._shapes() if shape.makes_pre]
        if makers:
            return makers[0].make_pre(self, x_centred, side, latents)
        W, b = (self.W_enc, self.b_enc) if latents is None else (self.W_enc[latents], self.b_enc[latents])
        return linear(x_centred, W, b)

    def _changed_pre(self, pre: Tensor, side: Side) -> Tensor:
        for shape in self._shapes():
            pre = shape.change_pre(pre, side)
        return pre

    def _factor(self, codes: Codes, side: Side, latents: Tensor | None = None) -> Tensor | None:
        factors = [shape.factor(codes, side, latents) for shape in self._shapes() if shape.has_factor]
        return math.prod(factors[1:], start=factors[0]) if factors else None


Init = Literal["tied", "xavier", "orthogonal"]
"""tied: the base's initial weights, random decoder rows and an encoder equal to them."""


@torch.no_grad()
def initialise(sae: SparseAutoencoder, how: Init, generator: torch.Generator, ties: bool) -> None:
    """Give encoder and decoder other initial weights.

    `ties`: Xavier's encoder equals its decoder, at Xavier's length. Drawn separately, they reconstruct nothing at any
    scale.
    """
    if how == "xavier":
        for table in (sae.W_enc, sae.W_dec):
            nn.init.xavier_uniform_(table, generator=generator)
        if ties:
            sae.W_enc.copy_(sae.W_dec)
        sae.W_dec.copy_(functional.normalize(sae.W_dec, dim=1))
    elif how == "orthogonal":
        rows = orthogonal_rows(sae.num_latents, sae.d_out, generator)
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows)


def orthogonal_rows(count: int, width: int, generator: torch.Generator) -> Tensor:
    """`count` rows of length one [count, width]; each block of `width` rows is orthogonal."""
    blocks = [nn.init.orthogonal_(torch.empty(width, width), generator=generator) for _ in range(-(-count // width))]
    return torch.cat(blocks)[:count]
