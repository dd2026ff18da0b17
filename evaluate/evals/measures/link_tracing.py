"""Causal tracing of single latents along attention: what a latent at one token does to the same latent at another.

1. A pair is a token and the earlier one that the layer above attends to most from it. Of each window the strongest
   pairs are taken, and of each pair the latent that makes the two codes most alike: the largest product of activations.
2. What the latent writes at the earlier token is taken out of the residual there, the layer above is run, and the
   same SAE reads the later token again.
3. The control takes the same vector out at the earlier token that is attended to least from there.
The later token's own residual is never touched: what changes of it has come by attention.
W windows, T positions, P pairs a window, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...context.loaded_sae import LoadedSae
from ...model.windows import Sums, Windows


@dataclass(frozen=True, eq=False)
class Pairs:
    """int64 [W, P] each, and which of them are pairs: a later token, the one it attends to most, and that least."""

    later: Tensor
    most: Tensor
    least: Tensor
    held: Tensor


@dataclass(frozen=True)
class Traced(Sums):
    """Sums over pairs."""

    pairs: int = 0
    shared: int = 0
    activation: float = 0.0  # of shared latents at the later token
    changed_by_most: float = 0.0
    changed_by_least: float = 0.0

    def metrics(self) -> dict[str, float]:
        """Changes as shares of the latent's activation at the later token."""
        found: dict[str, float] = {"pairs": self.pairs}
        if self.pairs:
            found["shared_share"] = self.shared / self.pairs
        if self.activation > 0:
            found["change_attended"] = self.changed_by_most / self.activation
            found["change_unattended"] = self.changed_by_least / self.activation
        return found


def choose_pairs(attended_WTT: Tensor, rows_WT: Tensor, count: int) -> Pairs:
    """Of each window the `count` later tokens that attend most to one earlier token, where there are two to tell."""
    place = torch.arange(rows_WT.shape[1], device=rows_WT.device)
    may = rows_WT[:, :, None] & rows_WT[:, None, :] & (place < place[:, None])
    strength, most = torch.where(may, attended_WTT, -1.0).max(dim=2)
    least = torch.where(may, attended_WTT, torch.inf).argmin(dim=2)
    strength = torch.where((may.sum(dim=2) > 1) & (most != least), strength, -1.0)
    best = strength.topk(min(count, strength.shape[1]), dim=1)
    later = best.indices
    return Pairs(later, most.gather(1, later), least.gather(1, later), best.values > 0)


def trace_pairs(
    subject: LoadedSae, batch: Windows, acts_WTF: Tensor, pairs: Pairs, above: Callable[[Tensor], Tensor]
) -> Traced:
    """`above` gives the residual after the next layer from that after the SAE's."""
    resid = batch.resid[subject.layer].float()
    window = torch.arange(len(resid), device=resid.device)
    before = _read(subject, batch, above(resid))
    total = Traced()
    for later, most, least, held in zip(*(part.T for part in vars(pairs).values()), strict=True):
        product, latent = (acts_WTF[window, later] * acts_WTF[window, most]).max(dim=1)
        shared = held & (product > 0)
        written = acts_WTF[window, most, latent, None] * subject.sae.W_dec[latent]
        changes = []
        for place in (most, least):
            without = resid.clone()
            without[window, place] -= written
            change = _read(subject, batch, above(without)) - before
            changes.append(float(change[window, later, latent].abs()[shared].double().sum()))
        active = float(acts_WTF[window, later, latent][shared].double().sum())
        total += Traced(int(held.sum()), int(shared.sum()), active, *changes)
    return total


def _read(subject: LoadedSae, batch: Windows, resid_WTD: Tensor) -> Tensor:
    """What the SAE says of the next layer's residual."""
    return subject.encode(replace(batch, resid={**batch.resid, subject.layer: resid_WTD}))
