"""How tiers of a dictionary fire, and how much the firing of one says about that of another.

N tokens, F latents, M tiers, F_t latents of tier t. A tier is a set of latents; an SAE without tiers gets
equal shares of its dictionary in the order of its latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.windows import Sums

SILENT = -1  # the label of a token on which no latent of a tier fires
PERMUTATIONS = 8  # for what two independent labellings of this size would share by chance


def equal_tiers(width: int, tiers: int = 3) -> Tensor:
    """int64 [F]: the tier of each latent when the dictionary is cut into equal shares."""
    return torch.arange(width) * tiers // width


@dataclass(frozen=True, eq=False)
class Activity(Sums):
    """Sums over tokens; those of two batches add up."""

    tokens: int
    fired: Tensor  # float64, on how many tokens each latent fires
    mass: Tensor  # float64, sum of each latent's activations
    awake: Tensor  # float64, on how many tokens any latent of a tier fires

    def of_tier(self, members_F: Tensor, tier: int) -> dict[str, float]:
        """The numbers of one tier, whose latents `members_F` marks."""
        fired, tokens = self.fired[members_F], max(self.tokens, 1)
        return {
            "latents": int(members_F.sum()),
            "l0": float(fired.sum() / tokens),
            "active_share": float(fired.mean() / tokens) if fired.numel() else 0.0,
            "awake_share": float(self.awake[tier] / tokens),
            "silent_latent_share": float((fired == 0).double().mean()) if fired.numel() else 0.0,
            "mass_share": float(self.mass[members_F].sum() / self.mass.sum().clamp_min(1e-30)),
        }


def tier_activity(acts_NF: Tensor, membership_F: Tensor, tiers: int) -> Activity:
    """What fired on a batch of tokens."""
    fired = acts_NF > 0
    awake = torch.stack([fired[:, membership_F == tier].any(1).sum() for tier in range(tiers)])
    return Activity(len(acts_NF), fired.sum(0).double(), acts_NF.double().sum(0), awake.double())


def dominant_latents(acts_NF: Tensor, membership_F: Tensor, tiers: int) -> Tensor:
    """int64 [N, M]: the strongest latent of each tier on each token, SILENT where none fires."""
    return torch.stack([_strongest(acts_NF, membership_F == tier) for tier in range(tiers)], dim=1)


def mutual_information(first_N: Tensor, second_N: Tensor) -> float:
    """I(first; second) of two labellings of the same tokens, in nats."""
    return _entropy(first_N) + _entropy(second_N) - _entropy(_joint(first_N, second_N))


def normalised_mutual_information(first_N: Tensor, second_N: Tensor) -> float:
    """I over the mean of both entropies: 0 independent, 1 each determines the other; 0 where one is constant."""
    mean = (_entropy(first_N) + _entropy(second_N)) / 2
    return mutual_information(first_N, second_N) / mean if mean > 0 else 0.0


def adjusted_mutual_information(first_N: Tensor, second_N: Tensor, generator: torch.Generator) -> float:
    """The same with what chance gives taken off: I - E[I] over mean entropy - E[I].

    Many labels on few tokens share information by accident; E[I] is measured on shuffled tokens.
    """
    information = mutual_information(first_N, second_N)
    mean = (_entropy(first_N) + _entropy(second_N)) / 2
    orders = [torch.randperm(len(first_N), generator=generator) for _ in range(PERMUTATIONS)]
    chance = sum(mutual_information(first_N[order], second_N) for order in orders) / PERMUTATIONS
    room = mean - chance
    return (information - chance) / room if room > 1e-9 else 0.0


def _strongest(acts_NF: Tensor, members_F: Tensor) -> Tensor:
    if not members_F.any():
        return torch.full((len(acts_NF),), SILENT, device=acts_NF.device)
    strength, place = acts_NF[:, members_F].max(1)
    return torch.where(strength > 0, members_F.nonzero().view(-1)[place], SILENT)


def _joint(first_N: Tensor, second_N: Tensor) -> Tensor:
    """One label for each pair of labels."""
    return (first_N - SILENT) * (int(second_N.max()) - SILENT + 1) + second_N - SILENT


def _entropy(labels_N: Tensor) -> float:
    counts = labels_N.unique(return_counts=True)[1].double()
    shares = counts / counts.sum()
    return float(-(shares * shares.log()).sum())
