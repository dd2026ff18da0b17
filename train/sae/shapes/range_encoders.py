"""Separate encoders for ranges of positions, with one decoder; and adapters of input or features for each range.

B rows, D width, P latents with an encoder in each of R ranges, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels.dense_products import linear
from ..kernels.hardware import reads_at_once
from ..kernels.sparse_products_with_gradients import rows_of
from ..model import SparseAutoencoder
from ..side_inputs import Side
from .masks import range_of
from .shaped_sae import Shape

ADAPTER = "adapter_coefficient"


class RangeEncoders(Shape):
    """The first P latents use the encoder of the row's range, the others that of the SAE."""

    needs_side = ("position",)
    makes_pre = True

    def __init__(self, W_RPD: Tensor, context: int, embeds: bool) -> None:
        super().__init__()
        ranges, _, width = W_RPD.shape
        self.context, self.ranges = context, ranges
        self.W = nn.Parameter(W_RPD.clone())
        self.embedding = nn.Parameter(torch.zeros(ranges, width)) if embeds else None

    def make_pre(self, sae: SparseAutoencoder, x_centred: Tensor, side: Side, latents: Tensor | None) -> Tensor:
        own = self.W.shape[1]
        here = range_of(self.position(side), self.context, self.ranges)
        if self.embedding is not None:
            embedding = self.embedding if latents is None else self.embedding.detach()
            x_centred = x_centred + rows_of(embedding, here)
        W = self.W
        if latents is not None:
            W = torch.where((latents < own)[:, None], W[:, latents.clamp_max(own - 1)], sae.W_enc[latents])
        tables = W.unbind(0)
        ranged = by_range(x_centred, here, self.ranges, lambda x, index: linear(x, tables[index]))
        if latents is not None:
            return ranged + sae.b_enc[latents]
        return torch.cat([ranged + sae.b_enc[:own], linear(x_centred, sae.W_enc[own:], sae.b_enc[own:])], dim=1)

    def rescale(self, factor: float) -> None:
        self.W.mul_(factor)


class Adapters(Shape):
    """x + c sigmoid(gate_r) MLP_r(layer norm of x), r the row's range; initially just x.

    The second layer starts at zero, and the coefficient c may rise over the run, so that the base trains first.
    """

    needs_side = ("position",)
    gates_each = False
    """Whether each added number has its own gate, instead of one gate for each range."""

    def __init__(
        self, width: int, hidden: int, context: int, ranges: int, lr_scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.context, self.ranges, self.lr_scale = context, ranges, lr_scale
        self.inner = nn.Parameter(torch.randn(ranges, width, hidden, generator=generator) / width**0.5)
        self.inner_bias = nn.Parameter(torch.zeros(ranges, hidden))
        self.outer = nn.Parameter(torch.zeros(ranges, hidden, width))
        self.gate = nn.Parameter(torch.zeros(ranges, width) if self.gates_each else torch.zeros(ranges))

    def adapt(self, x: Tensor, side: Side) -> Tensor:
        return self.add(x, x, side)

    def add(self, to: Tensor, read: Tensor, side: Side) -> Tensor:
        """`to` plus the MLPs' output for `read`."""
        c = side.knob(ADAPTER, 1.0)
        if c == 0.0:
            return to
        here = range_of(self.position(side), self.context, self.ranges)
        return to + c * by_range(read, here, self.ranges, self._added)

    def _added(self, x: Tensor, index: int) -> Tensor:
        normed = functional.layer_norm(x, x.shape[1:])
        hidden = functional.gelu(normed @ self.inner[index] + self.inner_bias[index])
        return self.gate[index].sigmoid() * (hidden @ self.outer[index])


class FeatureAdapters(Adapters):
    """After the features: pre + c sigmoid(gate_rf) MLP_r(layer norm of relu(pre)), before the gate of the SAE.

    What an adapter adds depends on what fires without it, and the SAE's gate still decides how many latents fire.
    """

    changes_pre = True
    gates_each = True

    def adapt(self, x: Tensor, side: Side) -> Tensor:
        return x

    def change_pre(self, pre: Tensor, side: Side) -> Tensor:
        return self.add(pre, pre.relu(), side)


def by_range(x: Tensor, here: Tensor, ranges: int, change: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Apply to each row the `change` of its range.

    On a GPU all rows go through the changes of all ranges: otherwise the host would wait for each range's row count.
    """
    if not reads_at_once(here):
        changed = change(x, 0)
        for index in range(1, ranges):
            changed = torch.where((here == index)[:, None], change(x, index), changed)
        return changed
    order = here.argsort(stable=True)
    rows = order.split(torch.bincount(here, minlength=ranges).tolist())
    return torch.cat([change(x[part], index) for index, part in enumerate(rows)])[order.argsort()]
