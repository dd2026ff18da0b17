"""Latents that are alive move between tiers, alone or in exchange, where the weighted loss of the tiers falls by it.

B rows, F latents, T tiers; e_u is what the set of tiers 0 to u leaves of the target, w_u what its loss counts, a and d
a latent's activation and decoder row. Alone, a latent that joins a set changes its loss by E[a^2] - 2 E[a <e_u, d>],
one that leaves it by E[a^2] + 2 E[a <e_u, d>]: from these follows what every move of one latent would do.
1. What each latent's move to each tier changes, on the batch at hand.
2. Single moves that lower the loss, as far as the sizes of tiers may drift; then exchanges of two latents that do.
3. Moves change each other: the loss with all of them is computed, and half are dropped until it is lower than before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from ..sae.kernels.functions import affine
from ..sae.kernels.nested import Tiering, tier_errors
from ..sae.step_view import View
from .tiers import switched_on, tiers_of

Group = list[tuple[int, int]]  # latents that move together, each with its new tier


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
    """[F, T], what the weighted loss changes by where one latent goes to a tier and all others stay."""
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
    """Moves and exchanges that lower the loss, the best first."""
    tiers, sizes = len(room), torch.bincount(membership, minlength=len(room)).tolist()
    groups: list[tuple[float, Group]] = []
    taken: set[int] = set()
    order = change_FT.flatten().argsort()
    for place in order[: int((change_FT < 0).sum())].tolist():
        latent, tier = divmod(place, tiers)
        own = int(membership[latent])
        if len(taken) < most and latent not in taken and sizes[tier] < room[tier] and sizes[own] > floor[own]:
            groups.append((float(change_FT[latent, tier]), [(latent, tier)]))
            sizes[tier], sizes[own] = sizes[tier] + 1, sizes[own] - 1
            taken.add(latent)
    for one, other in combinations(range(tiers), 2):
        groups += _exchanges(change_FT, membership, one, other, taken, most)
    return [group for _, group in sorted(groups, key=lambda found: found[0])]


def _exchanges(
    change_FT: Tensor, membership: Tensor, one: int, other: int, taken: set[int], most: int
) -> list[tuple[float, Group]]:
    """Pairs of latents of two tiers that are better off in each other's."""
    firsts, seconds = (
        [(float(change_FT[f, to]), f) for f in (membership == own).nonzero().view(-1).tolist() if f not in taken]
        for own, to in ((one, other), (other, one))
    )
    found: list[tuple[float, Group]] = []
    for (lost, first), (won, second) in zip(sorted(firsts), sorted(seconds), strict=False):
        if lost + won >= 0 or len(taken) + 2 > most:
            break
        found.append((lost + won, [(first, other), (second, one)]))
        taken |= {first, second}
    return found


@torch.no_grad()
def weighted_loss(view: View, membership: Tensor, tiers: int) -> Tensor:
    """What the tiers' reconstruction would come to with another membership, on the weights as they are now."""
    codes, sae = view.codes.map(torch.detach), view.sae
    errors, _ = tier_errors(codes, sae.W_dec, sae.b_dec, view.target, Tiering(membership, tiers))
    return view.side.ranks.mean((errors * _weights(view, tiers)).sum()) / view.stats.variance


def _weights(view: View, tiers: int) -> Tensor:
    return tiers_of(view).weights(switched_on(view, tiers))
