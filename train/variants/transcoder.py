"""Transcoder (Dunefsky et al. 2024): from the activations of one stored layer to those of another.

The latents of a top-k SAE, read from `layer`, written to `to_layer`. The input is not centred by the
decoder's bias, which belongs to the other layer; the encoder's bias starts so that it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.compose import Assembly, Term
from ..engine.optim import Optim
from ..engine.schedules import Constant
from ..kit.build import assemble, aux_term, require, require_sparsity, seeded, stats_or_unit, topk_optim
from ..sae.gates import TopK
from ..sae.model import EncoderProduct, SparseAutoencoder, tied_weights
from ..terms.constraints import UnitDecoder
from ..terms.reconstruction import reconstruction


@dataclass(frozen=True)
class Config:
    layer: int = 19
    to_layer: int = 20
    width: int = 16384
    k: int = 64
    seed: int = 0
    aux_weight: float = 1 / 32
    aux_k: int | None = None
    """Dead latents that each token may use; None: half of the residual width."""
    dead_after_tokens: int = 10_000_000
    encoder_product: EncoderProduct = "bfloat16"
    optim: Optim = field(default_factory=Optim)

    def request(self) -> Needs:
        require(self.layer != self.to_layer, f"to_layer: expected another layer than {self.layer}, found the same one")
        return Needs(inputs=(self.layer,), targets=(self.to_layer,))

    def build(self, d_model: int, stats: Stats | None = None, target_stats: Stats | None = None) -> Assembly:
        require_sparsity(self.k, self.width)
        stats, target_stats = stats_or_unit(stats, d_model), stats_or_unit(target_stats, d_model)
        generator = seeded(self.seed)
        W_enc, W_dec = tied_weights(self.width, d_model, generator)
        sae = SparseAutoencoder(
            W_enc,
            W_dec,
            TopK(self.k),
            b_dec=target_stats.mean.clone(),
            b_enc=-(W_enc @ stats.mean.to(torch.float32)),
            centres_input=False,
            encoder_product=self.encoder_product,
        )
        terms = (
            Term("reconstruction", reconstruction, Constant(1.0)),
            aux_term(self.aux_k, self.aux_weight, d_model),
        )
        optim = topk_optim(self.optim, self.width, stats.width)
        constraints = (UnitDecoder(),)
        return assemble(
            sae,
            stats,
            generator,
            optim,
            terms,
            constraints,
            self.dead_after_tokens,
            target_stats=target_stats,
        )
