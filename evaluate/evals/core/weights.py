"""What SAEBench says of each latent from the weights alone: bias, norm, and cosines with itself and others.

F latents, D width. A similarity is computed once for both its latents: blocks above the diagonal give
the maxima of their rows and of their columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ....train.sae.gates import Gated
from ....train.sae.kernels.linear import linear
from ....train.sae.model import SparseAutoencoder

BLOCK = 1024


@torch.inference_mode()
def weight_metrics(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """By SAEBench's names, each [F] on the CPU."""
    comparable = sae.d_in == sae.d_out
    cosine = functional.cosine_similarity(sae.W_dec, sae.W_enc, dim=1) if comparable else sae.W_enc[:, 0] * torch.nan
    found = {
        "encoder_bias": encoder_bias(sae),
        "encoder_norm": sae.W_enc.norm(dim=1),
        "encoder_decoder_cosine_sim": cosine,
        "max_decoder_cosine_sim": max_cosine(sae.W_dec),
        "max_encoder_cosine_sim": max_cosine(sae.W_enc),
    }
    return {name: values.float().cpu() for name, values in found.items()}


def encoder_bias(sae: SparseAutoencoder) -> Tensor:
    """Of a gated SAE, the bias of the magnitudes; zeros where there is none."""
    if isinstance(getattr(sae, "gate", None), Gated):
        return sae.gate.b_mag  # type: ignore[no-any-return]
    return getattr(sae, "b_enc", torch.zeros(sae.num_latents))


def max_cosine(rows_FD: Tensor, others_FD: Tensor | None = None, block: int = BLOCK) -> Tensor:
    """The largest cosine of each row with one of the others, or with another one of its own: [F].

    -inf where there is no other.
    """
    unit = functional.normalize(rows_FD, dim=1)
    if others_FD is not None:
        others = functional.normalize(others_FD, dim=1)
        return torch.cat([linear(part, others).amax(dim=1) for part in unit.split(block)])
    best = unit.new_full((len(unit),), -torch.inf)
    starts = range(0, len(unit), block)
    for first in starts:
        rows = slice(first, first + block)
        for second in starts[first // block :]:
            columns = slice(second, second + block)
            cosines = linear(unit[rows], unit[columns])
            if first == second:
                cosines.fill_diagonal_(-torch.inf)
            best[rows] = torch.maximum(best[rows], cosines.amax(dim=1))
            best[columns] = torch.maximum(best[columns], cosines.amax(dim=0))
    return best
