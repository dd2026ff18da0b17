"""Attention and codes: how well attention explains which tokens share codes, and what an SAE does to attention.

Contribution by layer: the similarity of a token's code to those of earlier ones, s_ij = cos(f_i, f_j), is explained by
least squares from the stored attention of layers from i to j. Nearness, 1 / (i - j), is always included: near tokens
attend to each other and are alike anyway. Everything is centred within its row i, to ask which tokens are alike, not
how alike they are overall. A layer's contribution is its mean gain in R^2 over all orders of entry (Shapley value).

Causal tracing: what a latent writes at a token is removed from the residual there, the layer above is run, and the same
SAE encodes a later token again, whose own residual is untouched: any change there has come through attention.

W windows, H heads, T context, L layers, S regressors, P pairs per window, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from math import comb

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...context.loaded_sae import LoadedSae
from ...model.batches import Sums, Windows

TINY = 1e-9  # below any stored probability
EXACT_LAYERS = 10  # 1024 subsets, half a second; every further layer doubles them
ORDERS = 256


@dataclass(frozen=True, eq=False)
class Explained(Sums):
    """Sums of products of [similarity, nearness, attention of each layer], centred by row."""

    products: Tensor  # float64 [2 + L, 2 + L]
    attended: Tensor  # float64 [L], sum over rows of the attention-weighted mean similarity
    usual: Tensor  # float64 [L], sum over the same rows of the plain mean similarity
    rows: Tensor  # float64 [L]

    @staticmethod
    def none(layers: int, device: torch.device | str = "cpu") -> Explained:
        zeros = torch.zeros(layers + 2, layers + 2, dtype=torch.float64, device=device)
        return Explained(zeros, *zeros[:3, 2:])

    def nearness(self) -> float:
        return self._r_squared(())

    def alone(self) -> list[float]:
        """R^2 of each layer alone, without nearness."""
        products = self.products
        scale = (products[0, 0] * products.diagonal()[2:]).clamp_min(1e-30)
        return (products[0, 2:].square() / scale).tolist()

    def contributions(self) -> list[float]:
        """Each layer's Shapley value in R^2 beyond nearness; for many layers, over a sample of orders."""
        layers = range(len(self.products) - 2)
        if len(layers) > EXACT_LAYERS:
            return _mean_gains(self._r_squared, len(layers), ORDERS)
        worth = {
            subset: self._r_squared(subset) for size in range(len(layers) + 1) for subset in combinations(layers, size)
        }
        return [_shapley(layer, worth, len(layers)) for layer in layers]

    def similarity_gain(self) -> list[float]:
        """Mean similarity of attended pairs minus that of all pairs of the same rows, by layer."""
        return ((self.attended - self.usual) / self.rows.clamp_min(1)).tolist()

    def _r_squared(self, layers: Sequence[int]) -> float:
        chosen = [1, *(layer + 2 for layer in layers)]
        products = self.products.cpu()  # small, and gelsd, which takes dependent regressors, is only there
        gram, along = products[chosen][:, chosen], products[chosen, 0]
        fitted = torch.linalg.lstsq(gram, along[:, None], driver="gelsd").solution[:, 0]
        return float(along @ fitted / products[0, 0].clamp_min(1e-30))


def explain(
    acts_WTF: Tensor, attention_LWTT: Tensor, takes_part_WT: Tensor, documents_WT: Tensor | None = None
) -> Explained:
    """Sums for how well stored attention explains the similarity of codes in a batch of windows.

    `attention` is averaged over heads; special tokens (the sink) and the token itself are not keys. Nor are tokens of
    another document: attention reflects where one begins, which alone would pass for information about single tokens.
    """
    unit = functional.normalize(acts_WTF, dim=2)
    similarity = unit @ unit.mT
    pairs = _earlier_pairs(takes_part_WT, documents_WT)
    lag = torch.arange(pairs.shape[1], device=pairs.device)
    near = 1.0 / (lag[:, None] - lag[None, :]).clamp_min(1).float()
    attention = torch.where(pairs, attention_LWTT, 0.0)
    tables = torch.stack([similarity, near.expand_as(similarity), *attention])
    flat = _centred_by_row(tables, pairs).double()
    attended, usual, rows = _attended(similarity, attention, pairs)
    return Explained(flat @ flat.T, attended, usual, rows)


def attention_divergence(stored_WHTT: Tensor, found_WHTT: Tensor) -> Tensor:
    """KL [W, H, T] of computed attention from stored rows, over the stored keys and all others as one.

    `stored` is zero where nothing was kept. Rounding to float16 can leave a negative rest, which counts as zero.
    """
    kept = stored_WHTT.float(), torch.where(stored_WHTT > 0, found_WHTT.float(), 0.0)
    rows = [torch.cat([part, (1 - part.sum(-1, keepdim=True)).clamp_min(0)], dim=-1) for part in kept]
    reference, found = ((row / row.sum(-1, keepdim=True)).double().clamp_min(TINY) for row in rows)
    return (reference * (reference / found).log()).sum(-1)


def _earlier_pairs(takes_part_WT: Tensor, documents_WT: Tensor | None) -> Tensor:
    """bool [W, T, T]: both take part and lie in one document, and the key comes first."""
    context = takes_part_WT.shape[1]
    earlier = torch.ones(context, context, dtype=torch.bool, device=takes_part_WT.device).tril(-1)
    pairs = takes_part_WT[:, :, None] & takes_part_WT[:, None, :] & earlier
    return pairs if documents_WT is None else pairs & (documents_WT[:, :, None] == documents_WT[:, None, :])


def _centred_by_row(tables_SWTT: Tensor, pairs_WTT: Tensor) -> Tensor:
    """[S, pairs]: each table at its pairs, minus its mean over the row."""
    kept = torch.where(pairs_WTT, tables_SWTT, 0.0)
    mean = kept.sum(-1, keepdim=True) / pairs_WTT.sum(-1, keepdim=True).clamp_min(1)
    return (kept - mean)[:, pairs_WTT]


def _attended(similarity_WTT: Tensor, attention_LWTT: Tensor, pairs_WTT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By layer, over rows that attend to any token: sums of weighted and of plain mean similarity, and their number."""
    mass = attention_LWTT.sum(-1)
    weighted = (attention_LWTT * similarity_WTT).sum(-1) / mass.clamp_min(TINY)
    plain = torch.where(pairs_WTT, similarity_WTT, 0.0).sum(-1) / pairs_WTT.sum(-1).clamp_min(1)
    attends = mass > TINY
    tables = weighted, plain.expand_as(weighted)
    attended, usual = (torch.where(attends, table, 0.0).double().sum((1, 2)) for table in tables)
    return attended, usual, attends.sum((1, 2)).double()


def _shapley(player: int, worth: dict[tuple[int, ...], float], players: int) -> float:
    """The player's mean gain over all orders of entry."""
    gains = 0.0
    for subset, value in worth.items():
        if player not in subset:
            joined = tuple(sorted((*subset, player)))
            gains += (worth[joined] - value) / (players * comb(players - 1, len(subset)))
    return gains


def _mean_gains(worth: Callable[[tuple[int, ...]], float], players: int, orders: int) -> list[float]:
    """Each player's mean gain over drawn orders of entry. Every drawn order is also taken in reverse: a player that
    gains by entering early also enters late, so means converge sooner."""
    worth, dice, gains = cache(worth), np.random.default_rng(0), np.zeros(players)
    for _ in range(orders // 2):
        drawn = dice.permutation(players).tolist()
        for order in (drawn, drawn[::-1]):
            values = [worth(tuple(sorted(order[:end]))) for end in range(players + 1)]
            gains[order] += np.diff(values)
    return (gains / (orders // 2 * 2)).tolist()


@dataclass(frozen=True, eq=False)
class Pairs:
    """A later token, the one it attends to most, and the one it attends to least; int64 [W, P] each."""

    later: Tensor
    most: Tensor
    least: Tensor
    is_pair: Tensor  # bool [W, P]; the others fill windows with fewer pairs


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


def choose_pairs(attended_WTT: Tensor, rows_WT: Tensor, count: int, documents_WT: Tensor | None = None) -> Pairs:
    """For each window, the `count` later tokens that attend most to one earlier token of their document, if that has
    two earlier ones to tell apart."""
    allowed = _earlier_pairs(rows_WT, documents_WT)
    strength, most = torch.where(allowed, attended_WTT, -1.0).max(dim=2)
    least = torch.where(allowed, attended_WTT, torch.inf).argmin(dim=2)
    strength = torch.where((allowed.sum(dim=2) > 1) & (most != least), strength, -1.0)
    best = strength.topk(min(count, strength.shape[1]), dim=1)
    later = best.indices
    return Pairs(later, most.gather(1, later), least.gather(1, later), best.values > 0)


def trace_pairs(
    subject: LoadedSae, batch: Windows, acts_WTF: Tensor, pairs: Pairs, above: Callable[[Tensor], Tensor]
) -> Traced:
    """`above` maps the residual after the SAE's layer to that after the next."""
    resid = batch.resid[subject.layer].float()
    window = torch.arange(len(resid), device=resid.device)
    before = _read(subject, batch, above(resid))
    total = Traced()
    for later, most, least, is_pair in zip(*(part.T for part in vars(pairs).values()), strict=True):
        product, latent = (acts_WTF[window, later] * acts_WTF[window, most]).max(dim=1)
        shared = is_pair & (product > 0)
        written = acts_WTF[window, most, latent, None] * subject.sae.W_dec[latent]
        changes = []
        for place in (most, least):
            without = resid.clone()
            without[window, place] -= written
            change = _read(subject, batch, above(without)) - before
            changes.append(float(change[window, later, latent].abs()[shared].double().sum()))
        active = float(acts_WTF[window, later, latent][shared].double().sum())
        total += Traced(int(is_pair.sum()), int(shared.sum()), active, *changes)
    return total


def _read(subject: LoadedSae, batch: Windows, resid_WTD: Tensor) -> Tensor:
    """The SAE's activations on the next layer's residual."""
    return subject.encode(replace(batch, resid={**batch.resid, subject.layer: resid_WTD}))
