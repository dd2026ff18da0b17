"""Attention as a loss: tokens that attend to each other should have similar codes.

B rows, W windows, T context, L layers, E links, n negatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..parallel.sums_over_processes import BatchRanks
from ..sae.attention.attention_encoder import Attention, has_links, link_weights, mixture
from ..sae.attention.attention_links import Links
from ..sae.kernels.codes import Codes
from ..sae.kernels.hardware import reads_at_once
from ..sae.kernels.sparse_products_with_gradients import rows_of
from ..sae.kernels.sparse_support import index_sum
from ..sae.kernels.window_gram import window_gram
from ..sae.step_view import View, once

Objective = Literal["divergence", "cross_entropy"]
EPSILON, TINY = 1e-6, 1e-12
FAR_BELOW = -1e9  # a logit that vanishes in a softmax, without infinity times zero


@dataclass(frozen=True)
class Guidance:
    """Contrastive: the codes of each token should identify the tokens it attends to.

    1. s_ij = cos(f_i, f_j) for the earlier tokens j of the window, and for n tokens of other windows.
    2. p_i = softmax over all of them of s_ij / temperature.
    3. Mean over tokens of the divergence of p_i from A_i, an InfoNCE whose soft positives are what the model
       attended to. Its gradient for the codes is that of the plain cross entropy, but not for the mixture: the
       cross entropy is linear in the layers' weights, so its minimum would give all weight to the easiest layer.
    """

    attention: Attention
    temperature: float
    negatives: int
    objective: Objective = "divergence"

    def __call__(self, view: View) -> Tensor:
        links, by_row = self.attention.links(view), self.attention.by_row(view)
        weights = link_weights(by_row, links)
        A = mixture(links, weights, view.x.shape[0])
        cosines = window_cosines(view)
        view.note("attention/links_per_token", links.is_first.sum() / view.x.shape[0])
        _note_contributions(view, self.attention, links, weights, cosines)
        logits = torch.cat([_earlier(view, cosines), self._negatives(view)], dim=1) / self.temperature
        log_p = functional.log_softmax(logits, dim=1)[:, : links.context]
        losses = -(A * log_p).sum(1)
        if self.objective == "divergence":
            losses = losses + (A * A.clamp_min(torch.finfo(A.dtype).tiny).log()).sum(1)
        return _mean_where(view, losses, has_links(by_row))

    def _negatives(self, view: View) -> Tensor:
        """[B, n]: cosines with random tokens of the batch, masked where the window is the same."""
        rows, count, ranks, generator = view.x.shape[0], self.negatives, view.side.ranks, view.generator
        picked = view.draw(lambda: torch.randperm(rows, generator=_generator(ranks, generator))[:count])
        norms = inverse_norms(view)
        cosines = view.codes.decode(columns_of(view.codes, picked)) * norms[:, None] * norms[picked]
        window = view.side.places.window
        return cosines.masked_fill(window[:, None] == window[picked], FAR_BELOW)


@dataclass(frozen=True)
class Consistency:
    """What the layers contribute to a token should agree.

    c^l = A^l f is what layer l contributes to each token, c = sum_l w_l c^l; the loss is the mean over tokens
    of sum_l w_l ||c^l - c||^2 / (||c||^2 + EPSILON). With the products K = f f^T of a window and
    q(a) = a^T K a = ||sum_j a_j f_j||^2 that is (sum_l w_l q(A^l) - q(A)) / (q(A) + EPSILON), so c is never computed.
    The weights get no gradient here, because the loss is zero wherever one layer has all the weight.
    """

    attention: Attention

    def __call__(self, view: View) -> Tensor:
        links, by_row = self.attention.links(view), self.attention.by_row(view).detach()
        products_LBT = _contribution_products(links, window_products(view))
        by_layer = (by_row * _lengths(links, products_LBT)).sum(0)
        A = mixture(links, link_weights(by_row, links), view.x.shape[0])
        together = (A * (by_row[:, :, None] * products_LBT).sum(0)).sum(1)
        spread = (by_layer - together).clamp_min(0.0)
        return _mean_where(view, spread / (together + EPSILON), has_links(by_row))


@once
def window_products(view: View) -> Tensor:
    """[B, T]: <f_i, f_j> for every token j of i's window."""
    return window_gram(view.codes, view.side.places)


@once
def inverse_norms(view: View) -> Tensor:
    """[B]: 1 / ||f_i||, or 0 for a silent row, which then passes on no gradient."""
    products = window_products(view)
    squares = products[torch.arange(len(products), device=products.device), view.side.places.position]
    return torch.where(squares > TINY, squares.clamp_min(TINY).rsqrt(), 0.0)


def window_cosines(view: View) -> Tensor:
    """[B, T]: cos(f_i, f_j) for every token j of i's window, zero where there is no token."""
    places, norms = view.side.places, inverse_norms(view)
    return window_products(view) * norms[:, None] * rows_of(places.spread(norms), places.window)


def columns_of(codes: Codes, rows: Tensor) -> Tensor:
    """[F, n]: the codes of some rows, as columns; differentiable."""
    if codes.support is None:
        return codes.values[rows].t()
    support = codes.support
    column = torch.full((codes.num_rows,), -1, device=rows.device)
    column[rows] = torch.arange(len(rows), device=rows.device)
    columns = column[support.rows]
    if not reads_at_once(columns):  # keep all entries; those of other rows become zeros in an extra column
        wide, is_chosen = len(rows) + 1, columns >= 0
        flat = codes.values.new_zeros(codes.num_latents * wide)
        places = support.latents.long() * wide + torch.where(is_chosen, columns, len(rows))
        flat = flat.index_put((places,), torch.where(is_chosen, codes.values, 0.0))
        return flat.view(codes.num_latents, wide)[:, :-1]
    chosen = (columns >= 0).nonzero().view(-1)
    flat = codes.values.new_zeros(codes.num_latents * len(rows))
    places = support.latents[chosen].long() * len(rows) + columns[chosen]
    return flat.index_put((places,), codes.values[chosen]).view(codes.num_latents, len(rows))


def _earlier(view: View, cosines: Tensor) -> Tensor:
    """Cosines with the candidates: only tokens before i, except the attention sink."""
    places = view.side.places
    position = torch.arange(cosines.shape[1], device=cosines.device)
    seen = (position < places.position[:, None]) & (position > 0) & (places.row_of >= 0)[places.window]
    return cosines.masked_fill(~seen, FAR_BELOW)


def _contribution_products(links: Links, products: Tensor) -> Tensor:
    """[L, B, T]: A^l K."""
    layers, rows = links.attends.shape
    products_LBT = functional.embedding_bag(
        links.key_row.to(torch.int32),
        products,
        links.offsets,
        mode="sum",
        per_sample_weights=links.share.to(products.dtype),
        include_last_offset=True,
    )
    return products_LBT.view(layers, rows, links.context)


def _lengths(links: Links, products_LBT: Tensor) -> Tensor:
    """[L, B]: ||c^l_i||^2."""
    at_links = rows_of(products_LBT.reshape(-1), links.place * links.context + links.key)
    return index_sum(links.share.to(products_LBT.dtype) * at_links, links.place, links.attends.numel()).view(
        links.attends.shape
    )


def _mean_where(view: View, losses: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts, losses, 0.0).sum() / view.side.ranks.share(counts.sum())


def _generator(ranks: BatchRanks, generator: torch.Generator) -> torch.Generator:
    """The SAE's own generator; where ranks share a batch, one for this step. Each rank draws according to its number of
    rows, while the SAE's generator, which the first rank saves, must advance equally in all."""
    if ranks.size == 1:
        return generator
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))


@torch.no_grad()
def _note_contributions(view: View, attention: Attention, links: Links, weights: Tensor, cosines: Tensor) -> None:
    """Log each layer's share of the similarity along the mixture's links."""
    if len(attention.layers) == 1:
        return
    along = weights * cosines[links.row, links.key]
    by_layer = index_sum(along, links.layer, len(attention.layers))
    for layer, share in zip(attention.layers, by_layer / by_layer.sum().clamp_min(TINY), strict=True):
        view.note(f"attention/contribution_{layer}", share)
