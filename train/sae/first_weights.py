"""First weights other than random rows: Xavier's uniform ones, or rows of orthogonal blocks.

D width, F latents. The decoder's rows keep length one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .model import SparseAutoencoder

Init = Literal["tied", "xavier", "orthogonal"]
"""tied: the base's own, random decoder rows and an encoder equal to them."""


@torch.no_grad()
def initialise(sae: SparseAutoencoder, how: Init, generator: torch.Generator, ties: bool) -> None:
    """Give encoder and decoder other first weights.

    `ties`: Xavier's encoder is its decoder, at Xavier's length. Drawn apart the two rebuild nothing at any scale.
    """
    if how == "xavier":
        for table in (sae.W_enc, sae.W_dec):
            nn.init.xavier_uniform_(table, generator=generator)
        if ties:
            sae.W_enc.copy_(sae.W_dec)
        sae.W_dec.copy_(functional.normalize(sae.W_dec, dim=1))
    elif how == "orthogonal":
        rows = orthogonal_rows(sae.num_latents, sae.d_out, generator)
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows)


def orthogonal_rows(count: int, width: int, generator: torch.Generator) -> Tensor:
    """`count` rows of length one [count, width]; each run of `width` of them is orthogonal."""
    blocks = [nn.init.orthogonal_(torch.empty(width, width), generator=generator) for _ in range(-(-count // width))]
    return torch.cat(blocks)[:count]
