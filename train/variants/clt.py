"""Cross-layer transcoder (Ameisen et al. 2025): latents that read one layer and write to it and to all later ones.

With `hook=mlp_in` they read what each layer's MLP reads, and together write what it and later MLPs write: a step that
goes through several layers is one latent. `k` counts the active latents of all layers together, chosen from the whole
batch. With the same hook on both sides it is the weakly causal crosscoder.
"""

from __future__ import annotations

from ...cache_schema.sites import RESID
from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.assembly import Assembly
from ..kit.build import require_layers, require_sparsity, write_hook
from ..kit.cross_layer import build_cross_layer
from ..kit.single_layer import Dictionary, WithAux, settings
from ..sae.gates import BatchTopK
from ..sae.kernels.linear import Product


@settings("layers width k seed aux_weight aux_k threshold_decay dead_after_tokens decoder_bias encoder_product optim")
class Config(WithAux, Dictionary):
    layers: tuple[int, ...] = (17, 18, 19, 20)
    k: float = 64.0
    threshold_decay: float = 0.99
    encoder_product: Product = "bfloat16"
    hook: str = RESID
    to_hook: str | None = None
    """None: mlp_out where the hook is mlp_in, else the same hook."""

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
