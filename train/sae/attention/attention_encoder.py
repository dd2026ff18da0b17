"""The attention that guides an SAE: which layers, how their rows are read and mixed, and an encoder that reads it.

L layers, B rows, W windows, T context, E links. A layer's attention has weight
w = softmax(theta / tau + log available) with learned theta; a row that some layers have no links for is mixed from the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..extra_modules import Extra
from ..kernels.codes import Codes
from ..kernels.dense_products import linear
from ..kernels.sparse_products_with_gradients import affine, rows_of
from ..kernels.sparse_support import index_sum
from ..model import SparseAutoencoder
from ..side_inputs import NO_SIDE, Side
from ..step_view import View, once
from .attention_links import LINK_SIDE_INPUTS, LinkKind, Links, links_of, nearest_links, same_token_links

MIXING = "mixing"  # the extra that holds the learned weights
TEMPERATURE = "mixing_temperature"  # the knob that flattens them


class Mixing(Extra):
    """Learned weights over layers, equal at first. `layers` and the last `weight` are for readers of the saved file."""

    is_recordable = True
    lr_scale = 10.0  # theta is a few numbers that every token of a batch influences

    layers: Tensor
    available: Tensor
    weight: Tensor

    def __init__(self, layers: Sequence[int], ablated: Sequence[int] = ()) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(len(layers)))
        self.register_buffer("layers", torch.tensor(layers))
        self.register_buffer("available", torch.tensor([layer not in ablated for layer in layers]))
        self.register_buffer("weight", torch.zeros(len(layers)))

    def forward(self, temperature: float = 1.0) -> Tensor:
        """[L], sums to one; exactly zero for ablated layers."""
        weights = (self.theta / temperature).masked_fill(~self.available, -torch.inf).softmax(0)
        self.weight.copy_(weights.detach())
        return weights


@dataclass(frozen=True)
class Attention:
    """How attention is read; the terms of a step share the results of its methods."""

    layers: tuple[int, ...]
    head: int | None = None
    min_mass: float = 0.05
    apart: bool = False
    kind: LinkKind = "attention"

    def read(self, side: Side, num_rows: int) -> Links:
        """The links of a batch."""
        attention, row_of = side["attention"], side["row_of"]
        links = links_of(
            attention, self.layers, row_of, num_rows, head=self.head, min_mass=self.min_mass, apart=self.apart
        )
        if self.kind == "attention":
            return links
        return nearest_links(links, side) if self.kind == "nearest" else same_token_links(links, side)

    @once
    def links(self, view: View) -> Links:
        return self.read(view.side, view.x.shape[0])

    @once
    def by_row(self, view: View) -> Tensor:
        """[L, B]: the weight of each layer in each row's mixture."""
        return weights_by_row(self.weights(view), self.links(view))

    @once
    def weights(self, view: View) -> Tensor:
        """[L], the weight of each layer."""
        return mixing_weights(view.sae, view.side, view.x)

    def note(self, view: View) -> None:
        """Log the mixture."""
        for layer, weight in zip(self.layers, self.weights(view), strict=True):
            view.note(f"mixing/weight_{layer}", weight)
        view.note("mixing/temperature", view.side.knob(TEMPERATURE, 1.0))


def mixing_weights(sae: SparseAutoencoder, side: Side, x: Tensor) -> Tensor:
    """The weights of the module's mixing; a single layer needs none."""
    mixing = mixing_of(sae)
    return x.new_ones(1) if mixing is None else mixing(side.knob(TEMPERATURE, 1.0)).to(x.dtype)


def mixing_of(sae: SparseAutoencoder) -> Mixing | None:
    """The learned weights: a module of an SAE that reads attention, else an extra; None for a single layer."""
    if MIXING in sae.extras:
        return cast(Mixing, sae.extras[MIXING])
    return cast(Any, getattr(sae, MIXING, None))


def weights_by_row(weights: Tensor, links: Links) -> Tensor:
    """[L, B]: the weights, renormalised over the layers that have links for a row; zero if none has."""
    present = weights[:, None] * links.attends
    total = present.sum(0)
    return present / torch.where(total > 0, total, 1.0)


def link_weights(by_row: Tensor, links: Links) -> Tensor:
    """[E]: the weight of each link in A = sum_l w_l A^l."""
    return rows_of(by_row.reshape(-1), links.place) * links.share


@dataclass(frozen=True)
class Noted:
    """Wraps a term so that it also logs the mixture, for SAEs whose mixture changes without a guidance term."""

    fn: Callable[[View], Tensor]
    attention: Attention

    def __call__(self, view: View) -> Tensor:
        self.attention.note(view)
        return self.fn(view)


def mixture(links: Links, weights_E: Tensor, num_rows: int) -> Tensor:
    """[B, T]: A = sum_l w_l A^l over the positions of each row's window."""
    places = links.row * links.context + links.key
    return index_sum(weights_E, places, num_rows * links.context).view(num_rows, links.context)


def has_links(by_row_LB: Tensor) -> Tensor:
    """bool [B]: the rows for which some layer with weight above zero has links."""
    return torch.any(by_row_LB.detach() > 0, dim=0)


class AttendedSae(SparseAutoencoder):
    """An SAE whose encoder also reads the activations of attended tokens; it starts equal to its base.

    pre_i = (x_i - c) W_enc^T + b_enc + sum_l w_l (A^l (x - c))_i V^l U^l, with V^l U^l of low rank, U zero at first and
    c the centre of the input: b_dec, or the mean while training. Activations [B, D] are first projected to the rank R,
    so that only R numbers are gathered per link.
    """

    is_plain = False

    def __init__(
        self,
        base: SparseAutoencoder,
        attention: Attention,
        mixing: Mixing | None,
        rank: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(**base.parts())
        width = rank * len(attention.layers)
        self.V = nn.Parameter(torch.randn(width, base.d_in, generator=generator) / base.d_in**0.5)
        self.U = nn.Parameter(torch.zeros(base.num_latents, width))
        self.attention = attention
        self.mixing = mixing
        self.needs_side = ("attention", "row_of", *LINK_SIDE_INPUTS[attention.kind])

    def codes(self, x: Tensor, side: Side = NO_SIDE) -> Codes:
        center = self.trained_center(side)
        attended = self.attended(x, side)
        with torch.no_grad():
            x_centred = self.centred(x)
            own, others = self._all_pre(x_centred), attended @ self.U.t()
            support = self.gate.choose(own + others, side)
            own, others = self._known(own, support), self._known(others, support)
        pre_values = affine(x_centred, center, self.W_enc, self.b_enc, support, own)
        no_bias = self.b_enc.new_zeros(self.num_latents)
        pre_values = pre_values + affine(attended, None, self.U, no_bias, support, others)
        pre = Codes(pre_values, support, x.shape[0], self.num_latents, pre=pre_values)
        return self.gate.open(pre, self.b_enc, side)

    def encoder_input(self, x: Tensor, side: Side) -> Tensor:
        return torch.cat([self.centred(x), self.attended(x, side)], dim=1)

    def encoder_rows(self, latents: Tensor) -> Tensor:
        return torch.cat([self.W_enc[latents], self.U[latents]], dim=1)

    def encode(self, x: Tensor, side: Side = NO_SIDE) -> Tensor:
        pre = linear(self.centred(x), self.W_enc, self.b_enc)
        return self.gate.infer(pre + self.attended(x, side) @ self.U.t(), self.b_enc)

    def attended(self, x: Tensor, side: Side) -> Tensor:
        """[B, L * R]: the weighted contribution of each layer's attention."""
        rows, layers = x.shape[0], len(self.attention.layers)
        if self.attention.apart and side["row_of"].shape[0] < 2:
            return x.new_zeros(rows, self.V.shape[0])  # in this control a single window has no other to read from
        links = self.attention.read(side, rows)
        weights = link_weights(weights_by_row(mixing_weights(self, side, x), links), links)
        low = (self.centred(x) @ self.V.t()).view(rows, layers, -1).transpose(0, 1).reshape(layers * rows, -1)
        gathered = functional.embedding_bag(
            (links.layer * rows + links.key_row).to(torch.int32),
            low,
            links.offsets,
            mode="sum",
            per_sample_weights=weights.to(low.dtype),
            include_last_offset=True,
        )
        return gathered.view(layers, rows, -1).transpose(0, 1).reshape(rows, -1)
