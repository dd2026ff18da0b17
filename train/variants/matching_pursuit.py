"""Matching pursuit (Mallat and Zhang 1993; as an SAE, Costa et al. 2025): latents are chosen in rounds.

Each of R rounds takes the k / R largest pre-activations of what earlier rounds left over, and subtracts what they
write, so that a direction already explained by an earlier latent is not chosen again. The published form is k rounds of
one latent; each round costs a dense product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.scaling import Stats
from ..engine.terms_and_constraints import Assembly
from ..kit.check_variant_settings import require_least
from ..sae.kernels.codes import Codes
from ..sae.kernels.dense_products import Product
from ..sae.kernels.select_top_k import topk_rows
from ..sae.kernels.sparse_products_with_gradients import affine, decode_at
from ..sae.kernels.sparse_support import support_from_topk
from ..sae.model import SparseAutoencoder
from ..sae.side_inputs import NO_SIDE, Side
from . import topk


class Pursuit(SparseAutoencoder):
    """An SAE whose encoder subtracts each round's reconstruction before the next."""

    is_plain = False
    counts: tuple[int, ...]
    """How many latents each round takes."""

    def codes(self, x: Tensor, side: Side = NO_SIDE) -> Codes:
        return self._pursue(x, self._all_pre)

    def encode(self, x: Tensor, side: Side = NO_SIDE) -> Tensor:
        rows = x.reshape(-1, self.d_in)
        codes = self._pursue(rows, lambda left: self._linear(left, self.W_enc, self.b_enc))
        return codes.dense().view(*x.shape[:-1], self.num_latents)

    def _pursue(self, x: Tensor, all_pre: Callable[[Tensor], Tensor]) -> Codes:
        left, values, chosen = self.centred(x), [], x.new_empty(len(x), 0, dtype=torch.int64)
        for count in self.counts:
            with torch.no_grad():
                pre = all_pre(left).scatter_(1, chosen, -torch.inf)
                latents = topk_rows(pre, count)[1]
            support = support_from_topk(latents, self.num_latents)
            found = affine(left, None, self.W_enc, self.b_enc, support).relu()
            left = left - decode_at(found, self.W_dec, None, support)
            values.append(found.view(latents.shape))
            chosen = torch.cat([chosen, latents], dim=1)
        support = support_from_topk(chosen, self.num_latents)
        return Codes(torch.cat(values, dim=1).reshape(-1), support, len(x), self.num_latents)


@dataclass(frozen=True)
class Config(topk.Config):
    centre_by_mean: bool = False
    encoder_product: Product = "float32"
    rounds: int = 4
    """Number of rounds; at most k."""

    def unread(self) -> Mapping[str, str]:
        why = "a round's input already has the decoder's bias subtracted; leave it out"
        return {**super().unread(), "centre_by_mean": why}

    def step_tables(self) -> float:
        return 2.5

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        require_least(self, rounds=1)
        assembly, rounds = super().build(d_model, stats), min(self.rounds, self.k)
        parts = assembly.sae.parts()
        parts["input_mean"] = None  # a later round's input already has the decoder's bias subtracted
        sae = Pursuit(**parts)
        sae.counts = tuple(self.k * (r + 1) // rounds - self.k * r // rounds for r in range(rounds))
        return assembly.with_sae(sae)
