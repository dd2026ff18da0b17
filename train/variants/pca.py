"""A sanity baseline: the k largest principal components of each token, as an SAE. D width.

Each direction appears in the dictionary twice, once with each sign, so that activations are never negative. The
covariance is summed over the training stream; its eigenvectors are recomputed whenever the number of batches has
doubled. Nothing is learned by gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from ...cache_schema import Manifest
from ..data.scaling import Stats
from ..engine.adam import Optim
from ..engine.terms_and_constraints import Assembly
from ..kit.check_variant_settings import require_sparsity, topk_optim
from ..kit.single_layer import RECONSTRUCTION, SingleLayer, build_plain
from ..sae.extra_modules import Extra
from ..sae.gates import TopK
from ..sae.model import SparseAutoencoder
from ..sae.step_view import View
from ..terms.constraints import Still


def refits(step: int, total_steps: int) -> float:
    """1 when the number of steps is a power of two, and after the last step; otherwise 0."""
    seen = step + 1
    return float(seen & (seen - 1) == 0 or seen == total_steps)


class Covariance(Extra):
    """The sum of products of centred activations."""

    products: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("products", torch.zeros(width, width))

    def observe(self, view: View) -> None:
        centred = view.x - view.sae.b_dec
        self.products += view.side.ranks.sum(centred.T @ centred)
        if view.side.knob("refit", 0.0):
            take_components(view.sae, self.products)


def take_components(sae: SparseAutoencoder, covariance_DD: Tensor) -> None:
    """Set encoder and decoder to the components, largest first, with both signs; the other latents stay silent."""
    components_DD = torch.linalg.eigh(covariance_DD.double()).eigenvectors.flip(1).T
    signed = torch.stack([components_DD, -components_DD], dim=1).flatten(0, 1)[: sae.num_latents]
    sae.W_enc.zero_()[: len(signed)] = signed.to(sae.W_enc.dtype)
    sae.W_dec[: len(signed)] = signed.to(sae.W_dec.dtype)
    sae.b_enc.zero_()


@dataclass(frozen=True)
class Config(SingleLayer):
    is_baseline: ClassVar[bool] = True

    k: int = 64
    """Active components per token. There are at most twice as many latents as the hook is wide."""

    def unread(self) -> dict[str, str]:
        names = (field.name for field in fields(Optim) if field.name != "start")  # which affects the first loss
        unread = (*(f"optim.{name}" for name in names), "centre_by_mean")
        return dict.fromkeys(unread, "nothing is learned by gradient; leave it out")

    def limits(self, manifest: Manifest, tokens: int) -> dict[str, float]:
        return {**super().limits(manifest, tokens), "width": 2 * self.input_width(manifest)}

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        require_sparsity(self.k, self.width)
        optim = topk_optim(self.optim, self.width, d_model)
        assembly = build_plain(self, d_model, stats, TopK(self.k), (RECONSTRUCTION,), optim, ())
        assembly = assembly.with_constraints(Still(tuple(dict(assembly.sae.named_parameters()))))
        return assembly.with_knobs(refit=refits).with_extra("covariance", Covariance(d_model))
