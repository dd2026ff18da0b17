"""An SAE whose encoder also reads the activations of attended tokens.

pre_i = (x_i - c) W_enc^T + b_enc + sum_l w_l (A^l (x - c))_i V^l U^l, with V^l U^l of low rank and c the centre of
the input: b_dec, or while training the mean.
Activations are projected to the low rank first, so that only R numbers are gathered per link.
B rows, D width, F latents, L layers, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels.codes import Codes
from ..kernels.dense_products import linear
from ..kernels.sparse_products_with_gradients import affine
from ..model import SparseAutoencoder
from ..side_inputs import NO_SIDE, Side
from .attention_links import READ_BESIDE
from .reading import Attention, Mixing, link_weights, mixing_weights, weights_by_row


class AttendedSae(SparseAutoencoder):
    """Starts equal to the SAE it is made from: U is zero."""

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
        self.needs_side = ("attention", "row_of", *READ_BESIDE[attention.kind])

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
            return x.new_zeros(rows, self.V.shape[0])  # the control: a single window has no other to read from
        links = self.attention.read(side, rows)
        weights = link_weights(weights_by_row(mixing_weights(self, side, x), links), links)
        low = (self.centred(x) @ self.V.t()).view(rows, layers, -1).transpose(0, 1).reshape(layers * rows, -1)
        brought = functional.embedding_bag(
            (links.layer * rows + links.key_row).to(torch.int32),
            low,
            links.offsets,
            mode="sum",
            per_sample_weights=weights.to(low.dtype),
            include_last_offset=True,
        )
        return brought.view(layers, rows, -1).transpose(0, 1).reshape(rows, -1)
