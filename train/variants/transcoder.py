"""Transcoder (Dunefsky et al. 2024): from the activations of one place to those of another.

The latents of a top-k or batch top-k SAE read `hook` of `layer` and write to `to_hook` of `to_layer`: with
`hook=mlp_in`, from a layer's MLP input to its output. The input is not centred by the decoder's bias, which belongs
to the target; instead the encoder's bias starts at the value that centres it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..data.batch import Needs
from ..data.scaling import Stats, unit_stats
from ..engine.terms_and_constraints import Assembly
from ..kit.check_variant_settings import require, require_sparsity, stats_or_unit, write_hook
from ..kit.single_layer import SingleLayer, WithAux, assemble_mapping, first_bias
from ..sae.gates import BatchTopK, TopK
from ..sae.kernels.dense_products import Product
from ..sae.model import SparseAutoencoder, tied_weights

RESID_TO_LAYER = 20


@dataclass(frozen=True)
class Config(WithAux, SingleLayer):
    to_layer: int | None = None
    """None: `layer` itself if another hook of it is reconstructed, otherwise 20."""
    k: int = 64
    encoder_product: Product = "bfloat16"
    to_hook: str | None = None
    """None: mlp_out if the hook is mlp_in, otherwise the same hook."""
    gate: Literal["topk", "batchtopk"] = "topk"
    """`batchtopk`: k is a mean, and the saved SAE has a jump threshold, which other tools support."""

    def needs(self) -> Needs:
        to_hook = write_hook(self.hook, self.to_hook)
        to_layer = self.to_layer
        if to_layer is None:
            to_layer = RESID_TO_LAYER if to_hook == self.hook else self.layer
        is_elsewhere = (self.hook, self.layer) != (to_hook, to_layer)
        require(is_elsewhere, f"to_layer: expected a layer other than {self.layer}, found the same one")
        return Needs(inputs=(self.layer,), targets=(to_layer,), hook=self.hook, to_hook=to_hook)

    def build(self, d_model: int, stats: Stats | None = None, target_stats: Stats | None = None) -> Assembly:
        require_sparsity(self.k, self.width)
        stats, target_stats = stats_or_unit(stats, d_model), target_stats or unit_stats(d_model)
        generator = torch.Generator().manual_seed(self.seed)
        W_enc, W_dec = tied_weights(self.width, d_model, generator)
        if target_stats.width != d_model:  # concatenated heads may be wider or narrower than the residual stream
            _, W_dec = tied_weights(self.width, target_stats.width, generator)
        sae = SparseAutoencoder(
            W_enc,
            W_dec,
            TopK(self.k) if self.gate == "topk" else BatchTopK(self.k),
            b_dec=first_bias(self.decoder_bias, target_stats),
            b_enc=None if self.centre_by_mean else -(W_enc @ stats.mean.to(torch.float32)),
            centres_input=False,
            encoder_product=self.encoder_product,
            input_mean=stats.mean.clone() if self.centre_by_mean else None,
        )
        return assemble_mapping(self, sae, d_model, generator, stats, target_stats)
