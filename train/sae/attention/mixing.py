"""How much each layer's attention counts: w = softmax(theta / tau + log available), theta learned.

L layers, B rows. A row that some layer has no links for is mixed from the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..extra_modules import Extra
from .attention_links import Links


class Mixing(Extra):
    """Learned weights over layers, equal at the start; `layers` and the last `weight` are for whoever reads
    the saved file."""

    lr_scale = 10.0  # a handful of numbers that every token of a batch has a say in

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


def weights_by_row(weights: Tensor, links: Links) -> Tensor:
    """[L, B]: the weights, shared out anew among the layers that have links for a row; zero where none has."""
    present = weights[:, None] * links.attends
    total = present.sum(0)
    return present / torch.where(total > 0, total, 1.0)


def link_weights(by_row: Tensor, links: Links) -> Tensor:
    """[E]: what each link counts for in A = sum_l w_l A^l."""
    return by_row[links.layer, links.row] * links.share
