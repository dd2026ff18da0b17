"""Activations and reconstruction of the kept tokens of a batch, sparse where that is faster.

The same numbers as `LoadedSae.encode` and `decode` up to the order of sums, at a fraction of the cost:
1. Rows are encoded in pieces, large enough for products to run at full speed and small enough to fit into memory.
2. For a top-k gate the largest entries are selected without sorting; for any other gate the active ones are picked out.
   Where the processor is faster in bfloat16, only entries that may be active are computed in float32.
3. The decoder adds up the rows of active latents. Where many are active, dense products are used.

N kept tokens, D width, F latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....train.sae.gates import DENSE_SHARE, BatchTopK, JumpRelu, TopK
from ....train.sae.kernels.codes import Codes, codes_from_dense
from ....train.sae.kernels.dense_products import linear
from ....train.sae.kernels.select_top_k import marked
from ....train.sae.kernels.sparse_support import support_from_topk
from ...context.bfloat16_then_float32 import can_look_twice, largest_products, products_above
from ...context.loaded_sae import LoadedSae
from ...model.batches import Windows

CPU_PIECE = 1 << 23  # pre-activations at once: 32 MB
GPU_PIECE = 1 << 28


@dataclass(frozen=True)
class Encoded:
    """One SAE's codes and reconstruction of some tokens."""

    codes: tuple[Codes, ...]  # by piece, in token order
    x_hat: Tensor  # [N, D_out]

    @property
    def l0(self) -> Tensor:
        """Nonzero entries of each token: float32 [N]."""
        return torch.cat([codes.sum_over_latents((codes.values != 0).float()) for codes in self.codes])

    @property
    def l1(self) -> Tensor:
        """Sum of the activations of each token: float32 [N]."""
        return torch.cat([codes.sum_over_latents(codes.values) for codes in self.codes])

    def fired(self) -> Tensor:
        """On how many tokens each latent is above zero: int64 [F]."""
        return torch.stack([codes.fired for codes in self.codes]).sum(dim=0)

    def fired_in(self, groups_N: Tensor, num_groups: int) -> Tensor:
        """In how many groups of tokens, such as windows, each latent is above zero: int64 [F]."""
        width = self.codes[0].num_latents
        seen = torch.zeros(num_groups * width, dtype=torch.bool, device=groups_N.device)
        start = 0
        for codes in self.codes:
            above = codes.values > 0
            if codes.support is None:
                row, latent = above.nonzero(as_tuple=True)
            else:
                row, latent = codes.support.rows[above].long(), codes.support.latents[above].long()
            seen[groups_N[start : start + codes.num_rows][row] * width + latent] = True
            start += codes.num_rows
        return seen.view(num_groups, width).sum(dim=0)


@torch.inference_mode()
def encode_kept(subject: LoadedSae, batch: Windows) -> Encoded:
    codes, sae = encode_codes(subject, batch), subject.sae
    if not sae.is_plain or subject.needs:
        parts = [subject.decode(part.dense()) for part in codes]
    else:
        parts = [part.decode(sae.W_dec, sae.b_dec) for part in codes]
    return Encoded(codes, sae.skip(batch.x(subject.layers)[batch.keep], torch.cat(parts)))


@torch.inference_mode()
def encode_codes(subject: LoadedSae, batch: Windows) -> tuple[Codes, ...]:
    """The codes of the kept tokens, in pieces."""
    if not subject.sae.is_plain or subject.needs:
        return (_sparse(subject.encode(batch)[batch.keep]),)
    x_ND = batch.x(subject.layers)[batch.keep]
    room = CPU_PIECE if x_ND.device.type == "cpu" else GPU_PIECE
    return tuple(encode(subject, x) for x in x_ND.split(max(1, room // subject.width)))


def encode(subject: LoadedSae, x_ND: Tensor) -> Codes:
    """A plain SAE's codes of some rows."""
    sae, gate, x_centred = subject.sae, subject.sae.gate, subject.sae.centred(x_ND)
    if isinstance(gate, TopK):
        values, latents = largest_products(subject.encoder, x_centred, gate.k)
        return Codes(values.relu().view(-1), support_from_topk(latents, sae.num_latents), len(x_ND), sae.num_latents)
    if isinstance(gate, JumpRelu | BatchTopK) and can_look_twice(x_centred, sae.W_enc):
        floor_F = gate.threshold.expand(sae.num_latents)
        found = products_above(subject.encoder, x_centred, floor_F, DENSE_SHARE)
        if found is not None:
            pre, support = found
            return Codes(torch.where(pre > floor_F[support.latents], pre, 0.0), support, len(x_ND), sae.num_latents)
    return _sparse(gate.infer(linear(x_centred, sae.W_enc, sae.b_enc), sae.b_enc))


def _sparse(acts_NF: Tensor) -> Codes:
    """Codes from dense activations: their active entries, where those are few."""
    return codes_from_dense(acts_NF, marked(acts_NF != 0, DENSE_SHARE))
