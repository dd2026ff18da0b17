"""How SAEs are built whose latents read one of several layers and write to it and to later ones."""

from __future__ import annotations

import torch

from ..data.scaling import Stats
from ..engine.assembly import Assembly
from ..sae.cross_layer import CrossLayerSae
from ..sae.gates import BatchTopK
from ..sae.model import tied_weights
from ..terms.constraints import WritesOnward
from .build import require, stats_or_unit
from .single_layer import Dictionary, assemble_mapping


def build_cross_layer(
    config: Dictionary,
    gate: BatchTopK,
    d_model: int,
    layers: int,
    stats: Stats | None,
    target_stats: Stats | None = None,
) -> Assembly:
    """Latents that begin as those of an SAE of each layer, and learn what they write to later ones."""
    require(config.width >= layers, f"width: expected a latent for each of {layers} layers, found {config.width}")
    stats = stats_or_unit(stats, d_model * layers)
    target_stats = stats if target_stats is None else target_stats
    generator = torch.Generator().manual_seed(config.seed)
    rows, _ = tied_weights(config.width, d_model, generator)
    b_dec = target_stats.mean.clone() if config.decoder_bias == "mean" else torch.zeros(target_stats.width)
    sae = CrossLayerSae(layers, rows, gate, torch.zeros(config.width), b_dec, config.encoder_product)
    with torch.no_grad():  # of an input that is not centred
        sae.b_enc.sub_(sae.encoder_times(stats.mean.to(torch.float32)).sum(1))
    return assemble_mapping(config, sae, d_model, generator, stats, target_stats, WritesOnward())
