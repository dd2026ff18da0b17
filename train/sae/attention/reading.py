"""The attention that guides an SAE: which layers, how their rows are read, how they are mixed.

L layers, B rows, W windows, T context, E links.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels.windows import Places
from ..model import SparseAutoencoder
from ..side_inputs import Side
from ..step_view import View, once
from .attention_links import Links, links_of
from .controls import READ_BESIDE, LinkKind, nearest_links, same_token_links
from .mixing import Mixing, weights_by_row

MIXING = "mixing"  # the extra that holds the learned weights
TEMPERATURE = "mixing_temperature"  # the knob that flattens them


@dataclass(frozen=True)
class Attention:
    """How attention is read; its methods share their results between the terms of a step."""

    layers: tuple[int, ...]
    head: int | None = None
    min_mass: float = 0.05
    apart: bool = False
    kind: LinkKind = "attention"

    @property
    def own_side(self) -> tuple[str, ...]:
        """Side inputs that its links take beside the attention."""
        return READ_BESIDE[self.kind]

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
        """[L, B]: how much of each row's mixture comes from each layer."""
        return weights_by_row(self.weights(view), self.links(view))

    @once
    def weights(self, view: View) -> Tensor:
        """[L], by layer."""
        return mixing_weights(view.sae, view.side, view.x)

    def note(self, view: View) -> None:
        """The mixture goes to the log."""
        for layer, weight in zip(self.layers, self.weights(view), strict=True):
            view.note(f"mixing/weight_{layer}", weight)
        view.note("mixing/temperature", view.side.knob(TEMPERATURE, 1.0))


def mixing_weights(sae: SparseAutoencoder, side: Side, x: Tensor) -> Tensor:
    """Of the module's mixing; a single layer needs none."""
    mixing = mixing_of(sae)
    return x.new_ones(1) if mixing is None else mixing(side.knob(TEMPERATURE, 1.0)).to(x.dtype)


def mixing_of(sae: SparseAutoencoder) -> Mixing | None:
    """The learned weights: a part of an SAE that reads attention, else an extra; none for a single layer."""
    if MIXING in sae.extras:
        return cast(Mixing, sae.extras[MIXING])
    return cast(Any, getattr(sae, MIXING, None))


@once
def places_of(view: View) -> Places:
    """Where the rows of the batch stand in their windows."""
    return Places(view.side["window"], view.side["position"], view.side["row_of"])


@dataclass(frozen=True)
class Noted:
    """A term that also logs the mixture, for SAEs whose mixture moves without a term of guidance."""

    fn: Callable[[View], Tensor]
    attention: Attention

    def __call__(self, view: View) -> Tensor:
        self.attention.note(view)
        return self.fn(view)


def mixture(links: Links, weights_E: Tensor, num_rows: int) -> Tensor:
    """[B, T]: A = sum_l w_l A^l over the positions of each row's window."""
    places = links.row * links.context + links.key
    flat = weights_E.new_zeros(num_rows * links.context)
    return flat.index_put((places,), weights_E, accumulate=True).view(num_rows, links.context)


def has_links(by_row_LB: Tensor) -> Tensor:
    """bool [B]: the rows that some layer of weight above zero has links for."""
    return torch.any(by_row_LB.detach() > 0, dim=0)
