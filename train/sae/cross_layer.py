"""An SAE over several layers: each latent reads one layer, and writes to it and to all later ones.

B rows, L layers side by side, each D_in wide where it is read and D_out where it is written, F latents. Latents are
assigned to the layers in order, as evenly as possible. W_enc is [F, D_in], what a latent reads of its layer; W_dec is
[F, L D_out], zero where a layer is earlier than the latent's.

To the encoder a row is L rows, one per layer. The pairs that the gate chose from [B, F] are the same in both views, in
the same order, so one sparse product reads and one writes, as in an SAE of one layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gates import BatchTopK
from .kernels.dense_products import Product, linear
from .kernels.sparse_products_with_gradients import affine
from .kernels.sparse_support import Support, group_of_each, group_offsets
from .model import SparseAutoencoder


def deal(width: int, layers: int) -> list[int]:
    """The number of latents of each layer."""
    return [width * (layer + 1) // layers - width * layer // layers for layer in range(layers)]


class CrossLayerSae(SparseAutoencoder):
    """Latents that each read one layer and write to it and all later ones. The saved SAE does not centre its input."""

    is_plain = False
    layer_of: Tensor

    def __init__(
        self,
        layers: int,
        rows: Tensor,
        gate: BatchTopK,
        b_enc: Tensor,
        b_dec: Tensor,
        encoder_product: Product,
        input_mean: Tensor | None,
    ) -> None:
        """`rows` [F, D_in] are what each latent reads and, as far as widths allow, writes to its own layer."""
        self.num_layers, self.sizes = layers, deal(len(rows), layers)
        layer_of = group_of_each(self.sizes)
        d_out = len(b_dec) // layers
        W_dec = rows.new_zeros(len(rows), layers, d_out)
        W_dec[torch.arange(len(rows)), layer_of, : rows.shape[1]] = rows[:, :d_out]
        super().__init__(rows, W_dec.flatten(1), gate, b_dec, b_enc, False, encoder_product, input_mean=input_mean)
        self.register_buffer("layer_of", layer_of, persistent=False)

    @property
    def d_in(self) -> int:
        return self.num_layers * self.W_enc.shape[1]

    def encoder_rows(self, latents: Tensor) -> Tensor:
        own = torch.arange(self.num_layers, device=latents.device) == self.layer_of[latents][:, None]
        return (own[:, :, None] * self.W_enc[latents][:, None]).flatten(1)

    def encoder_times(self, factor_D: Tensor) -> Tensor:
        return self.W_enc * factor_D.view(self.num_layers, -1)[self.layer_of]

    def bias_if_saved(self) -> Tensor:
        if self.input_mean is None:
            return torch.zeros_like(self.b_enc)
        return -self.encoder_times(self.input_mean).sum(1)

    def clear_unwritten(self, table_FD: Tensor) -> Tensor:
        layer = torch.arange(self.num_layers, device=table_FD.device)
        table_FD.unflatten(1, (self.num_layers, -1)).mul_((layer >= self.layer_of[:, None])[:, :, None])
        return table_FD

    def _linear(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        """Each layer's product, side by side: [..., F]."""
        layers = x.unflatten(-1, (self.num_layers, -1)).unbind(-2)
        tables = zip(layers, W_enc.split(self.sizes), b_enc.split(self.sizes), strict=True)
        return torch.cat([linear(part, W, b) for part, W, b in tables], dim=-1)

    def _affine(
        self, x: Tensor, center: Tensor | None, support: Support | None, known: Tensor | None, product: Product
    ) -> Tensor:
        assert support is not None and center is None
        row = support.rows.long() * self.num_layers + self.layer_of[support.latents]
        rows = x.reshape(x.shape[0] * self.num_layers, -1)
        by_layer = Support(group_offsets(row, len(rows)), support.latents, self.num_latents)
        return affine(rows, None, self.W_enc, self.b_enc, by_layer, known, product)
