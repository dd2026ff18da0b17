"""How much of a word's first letter is carried by other latents than the letter's own. B words, F latents, D width.

A latent's part in the letter is its activation times the cosine between its decoder row and the letter's probe;
decoder rows have length one. The whole is the residual's projection on the probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SILENT = 1e-8
MIN_COSINE_FULL = 0.025
MIN_COSINE_FRACTION = 0.1
MIN_SHARE = 0.4
MAX_ABSORBERS = 3


@dataclass(frozen=True, eq=False)
class Absorption:
    """For each word how much is absorbed, and whether one latent absorbed all of it."""

    fraction: Tensor  # float64 [B], 0 to 1
    full: Tensor  # bool [B]


def absorption(acts_BF: Tensor, x_BD: Tensor, W_dec_FD: Tensor, direction_D: Tensor, own: Sequence[int]) -> Absorption:
    """Absorption of the feature `direction_D` whose own latents are `own`, word by word."""
    direction_D = functional.normalize(direction_D, dim=0)
    cosines_F = functional.cosine_similarity(direction_D, W_dec_FD, dim=-1)
    parts_BF = acts_BF * cosines_F
    whole_B = (x_BD @ direction_D).double()
    return Absorption(
        fraction=_fractions(parts_BF, whole_B, cosines_F, own),
        full=_is_full(acts_BF, parts_BF, whole_B, cosines_F, own),
    )


def _fractions(parts_BF: Tensor, whole_B: Tensor, cosines_F: Tensor, own: Sequence[int]) -> Tensor:
    """The share of the absorbers in what they and the letter's own latents carry, where they matter at all."""
    own_B = parts_BF[:, list(own)].sum(1).double()
    absorbed_B = _absorbed(parts_BF, cosines_F, own)
    counts = (own_B < whole_B) & (absorbed_B / whole_B >= MIN_SHARE)
    taken_B = torch.minimum(absorbed_B, whole_B - own_B)
    fraction_B = torch.where(own_B <= 0, 1.0, (taken_B / (taken_B + own_B)).clamp(0, 1))
    return torch.where(counts, fraction_B, 0.0)


def _absorbed(parts_BF: Tensor, cosines_F: Tensor, own: Sequence[int]) -> Tensor:
    """The sum of the three largest parts of other latents that point along the probe."""
    may_absorb_F = cosines_F >= MIN_COSINE_FRACTION
    may_absorb_F[list(own)] = False
    candidates_BF = torch.where(may_absorb_F, parts_BF, 0.0).clamp(min=0)
    return candidates_BF.topk(min(MAX_ABSORBERS, parts_BF.shape[1]), dim=1).values.sum(1).double()


def _is_full(acts_BF: Tensor, parts_BF: Tensor, whole_B: Tensor, cosines_F: Tensor, own: Sequence[int]) -> Tensor:
    """The letter's own latents are silent, and one latent that points along the probe carries enough alone."""
    top_B, latent_B = parts_BF.max(1)
    silent_B = (acts_BF[:, list(own)] < SILENT).all(1)
    aligned_B = cosines_F[latent_B] >= MIN_COSINE_FULL
    return silent_B & aligned_B & (whole_B >= 0) & (top_B.double() / whole_B >= MIN_SHARE)
