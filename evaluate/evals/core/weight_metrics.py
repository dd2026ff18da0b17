"""Bias, norm and cosines of each latent, from the weights alone. F latents, D width.

Each pair's cosine is computed once: blocks above the diagonal give the maxima of both their rows and their columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ....train.sae.gates import Gated
from ....train.sae.kernels.dense_products import linear
from ....train.sae.model import SparseAutoencoder

BLOCK = 1024
Advance = Callable[[int], object]  # called with the amount of work done


@torch.inference_mode()
def weight_metrics(sae: SparseAutoencoder, advance: Advance = lambda pairs: None) -> dict[str, Tensor]:
    """Measures of the weights, under SAEBench's names and in its order, each [F] on the CPU."""
    comparable = sae.W_enc.shape == sae.W_dec.shape
    cosine = functional.cosine_similarity(sae.W_dec, sae.W_enc, dim=1) if comparable else sae.W_enc[:, 0] * torch.nan
    found = {
        "encoder_bias": sae.gate.b_mag if isinstance(sae.gate, Gated) else sae.b_enc,  # gated: the magnitudes' bias
        "encoder_norm": sae.W_enc.norm(dim=1),
        "encoder_decoder_cosine_sim": cosine,
        "max_decoder_cosine_sim": max_cosine(sae.W_dec, advance=advance),
        "max_encoder_cosine_sim": max_cosine(sae.W_enc, advance=advance),
    }
    return {name: values.float().cpu() for name, values in found.items()}


def max_cosine(rows_FD: Tensor, others_FD: Tensor | None = None, advance: Advance = lambda pairs: None) -> Tensor:
    """The largest cosine of each row with any of `others_FD`, or by default with any other row: [F].

    -inf where there is no other row. By default, `advance` is called with the number of further pairs done.
    """
    unit = functional.normalize(rows_FD, dim=1)
    if others_FD is not None:
        others = functional.normalize(others_FD, dim=1)
        return torch.cat([linear(part, others).amax(dim=1) for part in unit.split(BLOCK)])
    best = unit.new_full((len(unit),), -torch.inf)
    starts = range(0, len(unit), BLOCK)
    for first in starts:
        rows = slice(first, first + BLOCK)
        for second in starts[first // BLOCK :]:
            columns = slice(second, second + BLOCK)
            cosines = linear(unit[rows], unit[columns])
            if first == second:
                cosines.fill_diagonal_(-torch.inf)
            best[rows] = torch.maximum(best[rows], cosines.amax(dim=1))
            best[columns] = torch.maximum(best[columns], cosines.amax(dim=0))
        count = min(BLOCK, len(unit) - first)
        advance(count * (len(unit) - first) - count * (count + 1) // 2)
    return best
