"""Cross-layer transcoder (Ameisen et al. 2025): latents that read one layer and write to it and to all later ones.

With `hook=mlp_in` they read each layer's MLP input and together write the outputs of that and later MLPs, so that a
computation that spans several layers is one latent. `k` counts the active latents of all layers together, chosen from
the whole batch. With the same hook on both sides it is a weakly causal crosscoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...cache_schema.sites import RESID
from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.terms_and_constraints import Assembly
from ..kit.check_variant_settings import require, require_layers, require_sparsity, stats_or_unit, write_hook
from ..kit.single_layer import Dictionary, WithAux, assemble_mapping, first_bias
from ..sae.cross_layer import CrossLayerSae
from ..sae.gates import BatchTopK
from ..sae.kernels.dense_products import Product
from ..sae.model import tied_weights
from ..terms.constraints import WritesOnward


@dataclass(frozen=True)
class Config(WithAux, Dictionary):
    layers: tuple[int, ...] = (17, 18, 19, 20)
    k: float = 64.0
    threshold_decay: float = 0.99
    encoder_product: Product = "bfloat16"
    hook: str = RESID
    to_hook: str | None = None
    """None: mlp_out if the hook is mlp_in, otherwise the same hook."""

    def needs(self) -> Needs:
        require_layers(self.layers, rising=True)
        to_hook = write_hook(self.hook, self.to_hook)
        is_elsewhere = to_hook != self.hook
        return Needs(self.layers, self.layers if is_elsewhere else None, hook=self.hook, to_hook=to_hook)

    def layers_read(self) -> int:
        return 1

    def build(self, d_model: int, stats: Stats | None = None, target_stats: Stats | None = None) -> Assembly:
        require_sparsity(self.k, self.width)
        gate = BatchTopK(self.k, self.threshold_decay)
        return build_cross_layer(self, gate, d_model, len(self.layers), stats, target_stats)


def build_cross_layer(
    config: Dictionary,
    gate: BatchTopK,
    d_model: int,
    layers: int,
    stats: Stats | None,
    target_stats: Stats | None = None,
) -> Assembly:
    """Latents that start as those of one SAE per layer; what they write to later layers is learned."""
    require(config.width >= layers, f"width: expected a latent for each of {layers} layers, found {config.width}")
    stats = stats_or_unit(stats, d_model * layers)
    target_stats = stats if target_stats is None else target_stats
    generator = torch.Generator().manual_seed(config.seed)
    rows, _ = tied_weights(config.width, d_model, generator)
    b_dec = first_bias(config.decoder_bias, target_stats)
    mean = stats.mean.to(torch.float32, copy=True)
    sae = CrossLayerSae(
        layers,
        rows,
        gate,
        torch.zeros(config.width),
        b_dec,
        config.encoder_product,
        mean if config.centre_by_mean else None,
    )
    if not config.centre_by_mean:
        with torch.no_grad():  # start as if it were centred
            sae.b_enc.sub_(sae.encoder_times(mean).sum(1))
    return assemble_mapping(config, sae, d_model, generator, stats, target_stats, WritesOnward())
