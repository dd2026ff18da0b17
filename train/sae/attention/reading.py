"""The attention that guides an SAE: which layers, how their rows are read, how they are mixed.

L layers, B rows, W windows, T context, E links. A layer's attention has weight
w = softmax(theta / tau + log available) with learned theta; a row without links of some layers is mixed from the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..extra_modules import Extra
from ..kernels.sparse_products_with_gradients import rows_of
from ..kernels.sparse_support import index_sum
from ..kernels.window_gram import Places
from ..model import SparseAutoencoder
from ..side_inputs import Side
from ..step_view import View, once
from .attention_links import LinkKind, Links, links_of, nearest_links, same_token_links

MIXING = "mixing"  # the extra that holds the learned weights
TEMPERATURE = "mixing_temperature"  # the knob that flattens them


class Mixing(Extra):
    """Learned weights over layers, equal at the start; `layers` and the last `weight` are for readers of the
    saved file."""

    lr_scale = 10.0  # a few numbers that every token of a batch influences

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
    """The learned weights: a part of an SAE that reads attention, otherwise an extra; None for a single layer."""
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


@once
def places_of(view: View) -> Places:
    """The positions of the batch's rows in their windows."""
    return Places(view.side["window"], view.side["position"], view.side["row_of"])


@dataclass(frozen=True)
class Noted:
    """A term that also logs the mixture, for SAEs whose mixture changes without a guidance term."""

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
