"""Structure optimisation: latents that do nothing go where most is left to do, and boundaries follow.

Every N steps:
1. The relative residual of tier t is L_t / L_(t-1), L_(-1) = 1: the share that the tier leaves of what
   reached it. (L_t itself is always largest for the lowest tier, whose set is the smallest.)
2. The tier with the largest one receives latents that are dead or idle, the least active first.
3. No tier grows or shrinks by more than a given share of its first size.
4. Where asked for, latents that are alive follow, if the loss falls by it (`reallocation.py`).
A dead latent that has moved learns anew by the auxiliary loss of its base, as any dead latent does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sae.extra_modules import Extra
from ..sae.kernels.hardware import StepCount
from ..sae.step_view import View
from .reallocation import reallocated
from .tiers import tier_losses, tiers_of

DECAY = 0.99  # of the running means


@dataclass(frozen=True)
class Moves:
    """When latents move, which, and how far sizes may drift."""

    every_steps: int
    idle_frequency: float
    """Latents that fire on a smaller share of tokens are free to go."""
    most_at_once: float
    """Share of all latents."""
    drift: float
    """Share of a tier's first size."""
    live: bool = False
    """Latents that are alive move too."""

    def room(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """How many latents each tier may come to have."""
        return tuple(size + int(self.drift * size) for size in sizes)

    def floor(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """How many latents each tier keeps."""
        return tuple(size - int(self.drift * size) for size in sizes)


class Structure(Extra):
    """Running means of frequencies and losses, and the moves that follow from them."""

    frequency: Tensor
    losses: Tensor
    steps: Tensor
    moved: Tensor

    def __init__(self, moves: Moves, sizes: Sequence[int], followers: Sequence[Callable[[Tensor, Tensor], None]]):
        super().__init__()
        self.moves, self._sizes, self._followers = moves, tuple(sizes), tuple(followers)
        self.register_buffer("frequency", torch.zeros(sum(sizes)))
        self.register_buffer("losses", torch.zeros(len(sizes)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("moved", torch.zeros((), dtype=torch.int64))
        self._count = StepCount()

    @torch.no_grad()
    def observe(self, view: View) -> None:
        self._measure(view)
        if self._count.of(self.steps) % self.moves.every_steps == 0:  # these steps wait for a GPU
            tiers = tiers_of(view)
            before = tiers.membership.clone()
            after = self.reassigned(before, view.dead)
            if self.moves.live:
                room, floor = self.moves.room(self._sizes), self.moves.floor(self._sizes)
                after = reallocated(view, after, room, floor, int(self.moves.most_at_once * len(before)))
            tiers.membership.copy_(after)
            for follow in self._followers:
                follow(before, after)
            self.moved += (before != after).sum()
        view.note("tiers/moves", self.moved)

    def reassigned(self, membership: Tensor, dead: Tensor) -> Tensor:
        """The next membership."""
        reached = torch.cat([self.losses.new_ones(1), self.losses[:-1]])
        target = int((self.losses / reached.clamp_min(1e-12)).argmax())
        idle = (dead | (self.frequency < self.moves.idle_frequency)) & (membership != target)
        movable = _first_of_each_tier(idle, self.frequency, membership, self._spare(membership))
        room = self.moves.room(self._sizes)[target] - int((membership == target).sum())
        count = max(0, min(room, int(self.moves.most_at_once * len(membership)), len(movable)))
        after = membership.clone()
        after[movable[:count]] = target
        return after

    def _measure(self, view: View) -> None:
        ranks = view.side.ranks
        fired = ranks.sum(view.codes.fired) / ranks.rows(view.x.shape[0])
        losses = ranks.mean(tier_losses(view).detach())
        weight = max(1.0 - DECAY, 1.0 / (self._count.of(self.steps) + 1))
        self.frequency.lerp_(fired.to(self.frequency.dtype), weight)
        self.losses.lerp_(losses.to(self.losses.dtype), weight)
        self._count.add_one(self.steps)

    def _spare(self, membership: Tensor) -> list[int]:
        """How many latents each tier may lose."""
        sizes = torch.bincount(membership, minlength=len(self._sizes)).tolist()
        return [max(0, size - floor) for size, floor in zip(sizes, self.moves.floor(self._sizes), strict=True)]


def _first_of_each_tier(idle: Tensor, frequency: Tensor, membership: Tensor, spare: Sequence[int]) -> Tensor:
    """Idle latents, the least active first, no more of a tier than it can spare."""
    order = frequency.argsort(stable=True)
    order = order[idle[order]]
    chosen = [order[membership[order] == tier][:count] for tier, count in enumerate(spare)]
    latents = torch.cat(chosen)
    return latents[frequency[latents].argsort(stable=True)]
