"""Structure optimisation: idle latents move to the tier that has most left to explain, and tier sizes follow.

Every N steps:
1. The relative residual of tier t is L_t / L_(t-1), L_(-1) = 1: the share that the tier leaves of what
   reached it. (L_t itself is always largest for the lowest tier, whose set is the smallest.)
2. The tier with the largest relative residual receives latents that are dead or idle, the least active first.
3. No tier grows or shrinks by more than a given share of its initial size.
4. If requested, live latents also move, alone or in swaps of two, if that lowers the weighted loss of the tiers.
A dead latent that has moved is revived by the auxiliary loss of its base, like any dead latent.

How live latents are moved (B rows, F latents, T tiers; e_u is what the set of tiers 0 to u leaves of the target, w_u
the weight of its loss, a and d a latent's activation and decoder row):
1. A latent that joins a set changes the set's loss by E[a^2] - 2 E[a <e_u, d>], one that leaves it by
   E[a^2] + 2 E[a <e_u, d>]: this gives the change from moving each latent to each tier, on the current batch.
2. Take single moves that lower the loss, within the allowed drift of tier sizes; then swaps of two latents that do.
3. Moves affect each other: compute the loss with all of them, and drop half of them until it is lower than before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ..sae.extra_modules import StepCounter
from ..sae.kernels.nested_prefixes import Tiering, tier_errors
from ..sae.kernels.sparse_products_with_gradients import affine
from ..sae.step_view import View
from .tiers import shares_on, switched_on, tier_losses, tiers_of

Follower = Callable[[View, Tensor, Tensor], None]  # called with the membership before and after
Group = list[tuple[int, int]]  # latents that move together, each with its new tier


@dataclass(frozen=True)
class Moves:
    """When latents move, which ones, and how far tier sizes may drift."""

    every_steps: int
    idle_frequency: float
    """Latents that fire on a smaller share of tokens than this may move."""
    most_at_once: float
    """Share of all latents; of a small dictionary, one latent."""
    drift: float
    """Share of a tier's initial size."""
    live: bool = False
    """Whether live latents move too."""

    def most(self, num_latents: int) -> int:
        """The most latents that move at once."""
        return max(1, int(self.most_at_once * num_latents))

    def room(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The most latents that each tier may have."""
        return tuple(size + int(self.drift * size) for size in sizes)

    def floor(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The fewest latents that each tier may have."""
        return tuple(size - int(self.drift * size) for size in sizes)


class Structure(StepCounter):
    """Running means of frequencies and losses, and the moves based on them."""

    frequency: Tensor
    losses: Tensor
    moved: Tensor

    def __init__(self, moves: Moves, sizes: Sequence[int], followers: Sequence[Follower]):
        super().__init__()
        self.moves, self._sizes, self._followers = moves, tuple(sizes), tuple(followers)
        self.register_buffer("frequency", torch.zeros(sum(sizes)))
        self.register_buffer("losses", torch.zeros(len(sizes)))
        self.register_buffer("moved", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, view: View) -> None:
        self._measure(view)
        all_on = min(shares_on(view.side.knobs, len(self._sizes))) == 1  # a tier still off would attract all latents
        if all_on and self.steps_seen % self.moves.every_steps == 0:  # these steps wait for a GPU
            tiers = tiers_of(view)
            before = tiers.membership.clone()
            after = self.reassigned(before, view.dead)
            if self.moves.live:
                room, floor = self.moves.room(self._sizes), self.moves.floor(self._sizes)
                after = reallocated(view, after, room, floor, self.moves.most(len(before)))
            tiers.membership.copy_(after)
            for follow in self._followers:
                follow(view, before, after)
            self.moved += (before != after).sum()
        view.note("tiers/moves", self.moved)

    def reassigned(self, membership: Tensor, dead: Tensor) -> Tensor:
        """The next membership."""
        reached = torch.cat([self.losses.new_ones(1), self.losses[:-1]])
        target = int((self.losses / reached.clamp_min(1e-12)).argmax())
        idle = (dead | (self.frequency < self.moves.idle_frequency)) & (membership != target)
        sizes = torch.bincount(membership, minlength=len(self._sizes)).tolist()
        spare = [max(0, size - floor) for size, floor in zip(sizes, self.moves.floor(self._sizes), strict=True)]
        movable = _first_of_each_tier(idle, self.frequency, membership, spare)
        room = self.moves.room(self._sizes)[target] - sizes[target]
        count = max(0, min(room, self.moves.most(len(membership)), len(movable)))
        after = membership.clone()
        after[movable[:count]] = target
        return after

    def _measure(self, view: View) -> None:
        ranks = view.side.ranks
        fired = view.fired / ranks.rows(view.x.shape[0])
        losses = ranks.mean(tier_losses(view).detach())
        weight = self.weight_of_step
        self.frequency.lerp_(fired.to(self.frequency.dtype), weight)
        self.losses.lerp_(losses.to(self.losses.dtype), weight)
        self.add_step()


def _first_of_each_tier(idle: Tensor, frequency: Tensor, membership: Tensor, spare: Sequence[int]) -> Tensor:
    """Idle latents, the least active first, no more from each tier than it can spare."""
    order = frequency.argsort(stable=True)
    order = order[idle[order]]
    chosen = [order[membership[order] == tier][:count] for tier, count in enumerate(spare)]
    latents = torch.cat(chosen)
    return latents[frequency[latents].argsort(stable=True)]


def reallocated(view: View, membership: Tensor, room: Sequence[int], floor: Sequence[int], most: int) -> Tensor:
    """The next membership: at most `most` latents move, and no tier leaves its bounds. Waits for a GPU."""
    tiers = len(room)
    groups = choose(changes(view, membership, tiers).cpu(), membership.cpu(), room, floor, most)
    before = float(weighted_loss(view, membership, tiers))
    while groups:
        after = membership.clone()
        for latent, tier in (move for group in groups for move in group):
            after[latent] = tier
        if float(weighted_loss(view, after, tiers)) < before:
            return after
        groups = groups[: len(groups) // 2]
    return membership


@torch.no_grad()
def changes(view: View, membership: Tensor, tiers: int) -> Tensor:
    """[F, T], the change of the weighted loss if one latent moves to a tier and all others stay."""
    codes, W, weights = view.codes.map(torch.detach), view.sae.W_dec, _weights(view, tiers)
    tier_N, zero = codes.per_latent(membership), view.sae.b_enc.new_zeros(len(membership))
    square = codes.map(torch.square).latent_totals() / codes.num_rows * W.square().sum(1)
    joined, left = [], []
    for top in range(tiers):
        inside = codes.with_values(torch.where(tier_N <= top, codes.values, 0.0))
        error = view.target - inside.decode(W, view.sae.b_dec)
        along = codes.values * affine(error, None, W, zero, codes.support)
        cross = codes.with_values(along).latent_totals() / codes.num_rows
        joined.append(weights[top] * (square - 2.0 * cross))
        left.append(weights[top] * (square + 2.0 * cross))
    found = []
    for tier in range(tiers):
        change = torch.zeros_like(square)
        for top in range(tiers):
            change += torch.where((tier <= top) & (membership > top), joined[top], 0.0)
            change += torch.where((membership <= top) & (tier > top), left[top], 0.0)
        found.append(change)
    return view.side.ranks.mean(torch.stack(found, dim=1)) / view.stats.variance


def choose(change_FT: Tensor, membership: Tensor, room: Sequence[int], floor: Sequence[int], most: int) -> list[Group]:
    """Moves and swaps that lower the loss, the best first."""
    tiers, sizes = len(room), torch.bincount(membership, minlength=len(room)).tolist()
    groups: list[tuple[float, Group]] = []
    taken: set[int] = set()
    places = change_FT.flatten().argsort()[: int((change_FT < 0).sum())]
    columns = places // tiers, places % tiers, membership[places // tiers], change_FT.flatten()[places]
    for latent, tier, own, change in zip(*(column.tolist() for column in columns), strict=True):
        if len(taken) < most and latent not in taken and sizes[tier] < room[tier] and sizes[own] > floor[own]:
            groups.append((change, [(latent, tier)]))
            sizes[tier], sizes[own] = sizes[tier] + 1, sizes[own] - 1
            taken.add(latent)
    for one, other in combinations(range(tiers), 2):
        groups += _exchanges(change_FT, membership, one, other, taken, most)
    return [group for _, group in sorted(groups, key=lambda found: found[0])]


def _exchanges(
    change_FT: Tensor, membership: Tensor, one: int, other: int, taken: set[int], most: int
) -> list[tuple[float, Group]]:
    """Pairs of latents from two tiers whose swap lowers the loss."""

    def best(own: int, to: int) -> list[tuple[float, int]]:
        latents = (membership == own).nonzero().view(-1)
        changes = change_FT[latents, to]
        order = changes.argsort(stable=True)[: 2 * most]  # enough: at most `most` of them are already taken
        pairs = zip(changes[order].tolist(), latents[order].tolist(), strict=True)
        return [(change, latent) for change, latent in pairs if latent not in taken]

    found: list[tuple[float, Group]] = []
    for (lost, first), (won, second) in zip(best(one, other), best(other, one), strict=False):
        if lost + won >= 0 or len(taken) + 2 > most:
            break
        found.append((lost + won, [(first, other), (second, one)]))
        taken |= {first, second}
    return found


@torch.no_grad()
def weighted_loss(view: View, membership: Tensor, tiers: int) -> Tensor:
    """The tiers' reconstruction loss with another membership, at the current weights."""
    codes, sae = view.codes.map(torch.detach), view.sae
    errors, _ = tier_errors(codes, sae.W_dec, sae.b_dec, view.target, Tiering(membership, tiers))
    return view.side.ranks.mean((errors * _weights(view, tiers)).sum()) / view.stats.variance


def _weights(view: View, tiers: int) -> Tensor:
    return tiers_of(view).weights(switched_on(view, tiers))
