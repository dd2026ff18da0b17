"""Tree SAE (Cao et al. 2026): each latent has a parent, fires only where it fires, and refines its reconstruction.

B rows, F latents. The dictionary is split into layers. The parent of the first layer's latents is the root, which
always fires.
1. Each layer keeps its own number of a row's largest pre-activations, among latents whose parent fires.
2. Each layer together with the earlier ones reconstructs the input on its own, like the prefixes of a matryoshka.
3. Dead latents change parents: the loss of each step is divided among the latents that fired in it, and every few
   per cent of the run, dead children of parents with more children than their share move to parents with fewer.
   Halfway, those that are still dead become children of the root, and then the tree is fixed.
The published form doubles the interval between moves instead of keeping it constant, and has two or four layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from ..data.scaling import Stats
from ..engine.schedules import Constant
from ..engine.terms_and_constraints import Assembly, Term
from ..errors import SaeInvalid
from ..kit.check_variant_settings import ends_of, require, require_positive
from ..sae.extra_modules import Extra
from ..sae.kernels.codes import Codes, codes_from_dense
from ..sae.kernels.dense_products import Product, linear
from ..sae.kernels.select_top_k import topk_rows
from ..sae.kernels.sparse_support import Support, support_from_topk
from ..sae.model import SparseAutoencoder
from ..sae.side_inputs import NO_SIDE, Side
from ..sae.step_view import View
from ..terms.reconstruction_and_sparsity import NestedReconstruction
from . import topk

TREE = "tree"  # name of the extra, and of the knob for when latents change parents
STAY, MOVE, TO_ROOT = 0.0, 1.0, 2.0


class TreeSae(SparseAutoencoder):
    """An SAE whose latents fire layer by layer."""

    is_plain = False
    counts: tuple[int, ...]
    """How many latents each layer may keep."""
    ends: tuple[int, ...]
    """Where each layer ends."""
    parent: Tensor  # int64 [F], F for the root

    def layers(self) -> Iterator[tuple[int, int, int]]:
        """Start and end of each layer, and how many latents it keeps."""
        for (begin, end), count in zip(pairwise((0, *self.ends)), self.counts, strict=True):
            yield begin, end, count

    def choose(self, pre_all: Tensor, side: Side) -> Support:
        fires, chosen = self._none_but_the_root(pre_all), []
        for begin, end, count in self.layers():
            may_fire = fires[:, self.parent[begin:end]]
            values, latents = topk_rows(torch.where(may_fire, pre_all[:, begin:end], -torch.inf), count)
            chosen.append(latents + begin)
            fires.scatter_(1, chosen[-1], values > 0)
        return support_from_topk(torch.cat(chosen, 1), self.num_latents)

    def open(self, pre: Codes, side: Side) -> Codes:
        """In a layer with too few latents whose parent fires, `choose` took others too: their values become zero."""
        assert pre.support is not None
        shape = pre.num_rows, sum(self.counts)
        latents, values = pre.support.latents.long().view(shape), pre.values.relu().view(shape)
        fires, kept = self._none_but_the_root(values), []
        for own, found in zip(latents.split(self.counts, 1), values.split(self.counts, 1), strict=True):
            kept.append((found > 0) & fires.gather(1, self.parent[own]))
            fires.scatter_(1, own, kept[-1])
        return pre.with_values(torch.where(torch.cat(kept, 1), values, 0.0).reshape(-1))

    def encode(self, x: Tensor, side: Side = NO_SIDE) -> Tensor:
        pre = linear(self.centred(x.reshape(-1, self.d_in)), self.W_enc, self.b_enc)
        support = self.choose(pre.detach(), side)
        return self.open(codes_from_dense(pre, support), side).dense().view(*x.shape[:-1], self.num_latents)

    def require_sound(self, where: str) -> None:
        for begin, end, _ in self.layers():
            own = self.parent[begin:end]
            wrong = own[(own != self.num_latents) & ((own < 0) | (own >= begin))]
            if len(wrong):
                raise SaeInvalid(
                    f"{where}: expected parents of latents {begin} to {end - 1} before latent {begin}, or "
                    f"{self.num_latents} for none, found {int(wrong[0])}: copy the folder again"
                )

    def _none_but_the_root(self, rows: Tensor) -> Tensor:
        """bool [B, F + 1]"""
        fires = torch.zeros(len(rows), self.num_latents + 1, dtype=torch.bool, device=rows.device)
        fires[:, -1].fill_(True)
        return fires


class Tree(Extra):
    """Sums each latent's share of the loss, and gives dead latents other parents."""

    share: Tensor

    def __init__(self, num_latents: int, first: int, loss: NestedReconstruction) -> None:
        super().__init__()
        self.loss = loss
        self.register_buffer("share", torch.zeros(num_latents + 1))
        self.register_buffer("below", torch.arange(num_latents) >= first)

    def retired_latents(self, knobs: Mapping[str, float]) -> Tensor:
        """The auxiliary loss covers only the first layer: it would revive a child where its parent does not fire."""
        return cast(Tensor, self.below)

    @torch.no_grad()
    def observe(self, view: View) -> None:
        fired = torch.cat([view.fired > 0, self.share.new_ones(1, dtype=torch.bool)])
        self.share += fired * (view.side.ranks.mean(self.loss(view)) / fired.sum())
        due, sae = view.side.knob(TREE, STAY), cast(TreeSae, view.sae)
        if due == STAY:
            return
        for begin, end, _ in [*sae.layers()][1:]:
            dead = view.still_dead[begin:end].nonzero().view(-1) + begin
            if due == TO_ROOT:
                sae.parent[dead] = sae.num_latents
            else:
                self._move(sae, begin, end, dead, view)
        self.share.zero_()

    def _move(self, sae: TreeSae, begin: int, end: int, dead: Tensor, view: View) -> None:
        """Move dead children of a layer from parents that have more than their share to parents that have fewer."""
        pool = torch.cat([self.share[:begin] * ~view.still_dead[:begin], self.share[-1:]])
        own = sae.parent[begin:end].clamp_max(begin)  # the root comes after the candidates
        spare = torch.bincount(own, minlength=begin + 1) - quotas(pool, end - begin)
        dead = dead[torch.randperm(len(dead), generator=view.generator).to(dead.device)]
        family, order = torch.sort(sae.parent[dead].clamp_max(begin), stable=True)
        place = torch.arange(len(family), device=dead.device) - torch.searchsorted(family, family)  # in its family
        leaving = dead[order[place < spare[family]]]
        wanted = torch.arange(begin + 1, device=dead.device).repeat_interleave(-spare.clamp_max(0))
        wanted = wanted[torch.randperm(len(wanted), generator=view.generator).to(dead.device)]
        count = min(len(leaving), len(wanted))
        taken = wanted[:count]
        sae.parent[leaving[:count]] = torch.where(taken == begin, sae.num_latents, taken)


def quotas(share_P: Tensor, count: int) -> Tensor:
    """int64 [P], `count` children distributed in proportion to the shares; evenly if all shares are zero."""
    if float(share_P.sum()) <= 0:
        share_P = torch.ones_like(share_P)
    exact = share_P.double() / share_P.double().sum() * count
    whole = exact.floor().long()
    more = (exact - whole).argsort(descending=True, stable=True)[: count - int(whole.sum())]
    return whole.index_add(0, more, torch.ones_like(more))


@dataclass(frozen=True)
class Moving:
    """When latents change parents: at intervals until a share of the run, then once to the root."""

    every_fraction: float
    until_fraction: float

    def __call__(self, step: int, total_steps: int) -> float:
        until = min(round(self.until_fraction * total_steps), total_steps - 1)
        every = max(1, round(self.every_fraction * total_steps))
        if step == until:
            return TO_ROOT
        return MOVE if 0 < step < until and step % every == 0 else STAY


@dataclass(frozen=True)
class Config(topk.Config):
    encoder_product: Product = "float32"
    layer_fractions: tuple[float, ...] = (0.25, 1.0)
    """Where each layer of the tree ends, as shares of the dictionary."""
    k_shares: tuple[float, ...] = (0.8125, 0.1875)
    """Share of a token's k active latents for each layer."""
    move_every_fraction: float = 0.03
    """Interval at which dead latents change parents, as a share of the run."""
    move_until_fraction: float = 0.5
    """Share of the run after which dead latents become children of the root, and the tree is fixed."""

    def step_tables(self) -> float:
        return 3.0

    def ends(self) -> tuple[int, ...]:
        return ends_of("layer_fractions", self.layer_fractions, self.width)

    def counts(self) -> tuple[int, ...]:
        """Active latents of each layer, k in total."""
        shares, ends = self.k_shares, self.ends()
        require(len(shares) == len(ends), f"k_shares: expected {len(ends)}, one per layer, found {shares}")
        require(abs(sum(shares) - 1.0) < 1e-6, f"k_shares: expected shares that sum to 1, found {shares}")
        bounds = [round(sum(shares[:layer]) * self.k) for layer in range(len(shares) + 1)]
        counts = tuple(high - low for low, high in pairwise(bounds))
        sizes = tuple(high - low for low, high in pairwise((0, *ends)))
        fits = all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
        require(
            fits,
            f"k_shares: expected 1 or more active latents in each layer and at most its size, {sizes}, found {shares} "
            f"of --k {self.k}, which give {counts}: choose other shares, or another --k or --width",
        )
        return counts

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        require_positive(self, "move_every_fraction", "move_until_fraction", most=1)
        ends, counts = self.ends(), self.counts()
        nested = NestedReconstruction(ends, (1.0,) * len(ends))
        term = Term("reconstruction", nested, Constant(1.0), nested.residual)
        assembly = super().build(d_model, stats).replacing(term)
        sae = TreeSae(**assembly.sae.parts())
        sae.ends, sae.counts = ends, counts
        parents = [torch.full((ends[0],), self.width)]
        for begin, end in pairwise(ends):
            drawn = torch.randint(0, begin + 1, (end - begin,), generator=assembly.generator)
            parents.append(torch.where(drawn == begin, self.width, drawn))
        sae.register_buffer("parent", torch.cat(parents))
        moving = Moving(self.move_every_fraction, self.move_until_fraction)
        assembly = assembly.with_sae(sae).with_extra(TREE, Tree(self.width, ends[0], nested))
        return assembly.with_knobs(**{TREE: moving})
