"""How tiers of a dictionary fire, what one tier's firing says about another's, and what tiers are composed of.

Composition: is a decoder row a sum, with weights C >= 0, of decoder rows of the tier below? If there are more than
twice as many of those as the width, almost any row is; so rows are also fitted by few parts (matching pursuit), and
both fits are compared with those of random rows.

N tokens, F latents, K kept, M tiers; R rows, A atoms, D width, P parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...model.batches import Sums, Windows
from ..evaluation_contract import Context
from .token_text import Vocabulary

SILENT = -1  # the label of a token on which no latent of a tier fires
PERMUTATIONS = 8  # to estimate what independent labellings of this size share by chance


@dataclass(frozen=True, eq=False)
class Activity(Sums):
    """Sums over tokens."""

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
    fired = acts_NF > 0
    awake = torch.stack([fired[:, membership_F == tier].any(1).sum() for tier in range(tiers)])
    return Activity(len(acts_NF), fired.sum(0).double(), acts_NF.sum(0, dtype=torch.float64), awake.double())


@dataclass(frozen=True, eq=False)
class Strongest:
    """The K largest activations [K, F] of each latent and their tokens; 0 and -1 if it fired less often."""

    values: Tensor  # float32
    places: Tensor  # int64, token numbers as given

    @staticmethod
    def none(kept: int, latents: int, device: torch.device | str = "cpu") -> Strongest:
        return Strongest(
            torch.zeros(kept, latents, device=device),
            torch.full((kept, latents), -1, dtype=torch.int64, device=device),
        )

    def with_batch(self, acts_NF: Tensor, places_N: Tensor) -> Strongest:
        kept = len(self.values)
        values, rows = acts_NF.topk(min(kept, len(acts_NF)), dim=0)
        places = torch.where(values > 0, places_N[rows], -1)
        values, chosen = torch.cat([self.values, values.clamp_min(0)]).topk(kept, dim=0)
        return Strongest(values, torch.cat([self.places, places]).gather(0, chosen))

    def of(self, latent: int) -> list[tuple[float, int]]:
        """(activation, token) of one latent, strongest first."""
        pairs = zip(self.values[:, latent].tolist(), self.places[:, latent].tolist(), strict=True)
        return [(value, place) for value, place in pairs if place >= 0]


class KeptTokens:
    """The text of a pass's kept tokens, which are numbered in reading order."""

    def __init__(self, context: Context) -> None:
        self._vocabulary = Vocabulary(context)
        self._batches: list[Tensor] = []

    def read(self, batch: Windows) -> None:
        self._batches.append(batch.tokens[batch.keep].cpu())

    def token(self, number: int) -> str:
        return self._vocabulary.write(self._tokens[number : number + 1])

    @cached_property
    def _tokens(self) -> np.ndarray:
        """int64 [N]; only used after the pass."""
        return torch.cat(self._batches).numpy()


def dominant_latents(acts_NF: Tensor, membership_F: Tensor, tiers: int) -> Tensor:
    """int64 [N, M]: the strongest latent of each tier on each token, SILENT where none fires."""
    return torch.stack([_strongest(acts_NF, membership_F == tier) for tier in range(tiers)], dim=1)


def mutual_information(first_N: Tensor, second_N: Tensor) -> float:
    """I(first; second) of two labellings of the same tokens, in nats."""
    pair_N = (first_N - SILENT) * (int(second_N.max()) - SILENT + 1) + second_N - SILENT  # one label for each pair
    return _entropy(first_N) + _entropy(second_N) - _entropy(pair_N)


def normalised_mutual_information(first_N: Tensor, second_N: Tensor) -> float:
    """I over the mean of both entropies: 0 independent, 1 each determines the other; 0 where one is constant."""
    mean = (_entropy(first_N) + _entropy(second_N)) / 2
    return mutual_information(first_N, second_N) / mean if mean > 0 else 0.0


def adjusted_mutual_information(first_N: Tensor, second_N: Tensor, generator: torch.Generator) -> float:
    """The same, corrected for chance: I - E[I] over mean entropy - E[I].

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


def _entropy(labels_N: Tensor) -> float:
    counts = labels_N.unique(return_counts=True)[1].double()
    shares = counts / counts.sum()
    return float(-(shares * shares.log()).sum())


ITERATIONS = 200
FEW_ITERATIONS = 60
POWER_ITERATIONS = 30
ROWS_AT_ONCE = 2048  # bounds the memory for products of rows and atoms
EXPLAINED = 0.5  # share of a row's squared length from which it counts as composed


def fit_all(rows_RD: Tensor, atoms_AD: Tensor) -> Tensor:
    """[R, A]: argmin over C >= 0 of ||rows - C atoms||^2."""
    along, curvature = rows_RD @ atoms_AD.T, _largest_eigenvalue(atoms_AD)
    if len(atoms_AD) > atoms_AD.shape[1]:  # two thin products are cheaper than one with the Gram matrix
        return _descend(along, lambda c: (c @ atoms_AD) @ atoms_AD.T, curvature, ITERATIONS)
    gram = atoms_AD @ atoms_AD.T
    return _descend(along, lambda c: c @ gram, curvature, ITERATIONS)


def fit_few(rows_RD: Tensor, atoms_AD: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Greedily chosen atoms int64 [R, P] and their weights [R, P]; a part with weight zero is not needed."""
    chosen = torch.empty(len(rows_RD), 0, dtype=torch.int64, device=rows_RD.device)
    weights = rows_RD.new_empty(len(rows_RD), 0)
    left = rows_RD
    for _ in range(min(parts, len(atoms_AD))):
        along = (left @ atoms_AD.T).scatter(1, chosen, -torch.inf)
        chosen = torch.cat([chosen, along.argmax(1, keepdim=True)], dim=1)
        picked = atoms_AD[chosen]
        weights = _fit_each(rows_RD, picked)
        left = rows_RD - (weights[:, None, :] @ picked).squeeze(1)
    return chosen, weights


def explained(rows_RD: Tensor, fitted_RD: Tensor) -> Tensor:
    """R^2 [R]: the share of each row's squared length that its fit explains."""
    left = (rows_RD - fitted_RD).square().sum(1)
    return 1 - left / rows_RD.square().sum(1).clamp_min(1e-30)


def explained_by_few(rows_RD: Tensor, atoms_AD: Tensor, parts: int) -> Tensor:
    """R^2 [R] of the fit by few parts."""
    found = []
    for rows in rows_RD.split(ROWS_AT_ONCE):
        chosen, weights = fit_few(rows, atoms_AD, parts)
        found.append(explained(rows, (weights[:, None, :] @ atoms_AD[chosen]).squeeze(1)))
    return torch.cat(found)


def explained_by(learned_RA: Tensor, rows_RD: Tensor, atoms_AD: Tensor) -> Tensor:
    """R^2 [R] of a learned composition, up to each row's length: rows are rescaled when they are saved."""
    fitted = learned_RA @ atoms_AD
    dot = (fitted * rows_RD).sum(1).clamp_min(0)
    return dot.square() / (fitted.square().sum(1) * rows_RD.square().sum(1)).clamp_min(1e-30)


def random_rows(like_RD: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of the same lengths in random directions, for coverage by chance."""
    rows = torch.randn(like_RD.shape, generator=generator).to(like_RD)
    return rows / rows.norm(dim=1, keepdim=True) * like_RD.norm(dim=1, keepdim=True)


def _fit_each(rows_RD: Tensor, picked_RPD: Tensor) -> Tensor:
    """[R, P]: each row by its own few atoms."""
    gram = picked_RPD @ picked_RPD.mT
    along = (picked_RPD @ rows_RD[:, :, None]).squeeze(2)
    bound = gram.abs().sum(-1).amax(-1, keepdim=True)  # no eigenvalue is larger
    return _descend(along, lambda c: (c[:, None, :] @ gram).squeeze(1), bound, FEW_ITERATIONS)


def _descend(along: Tensor, times_gram: Callable[[Tensor], Tensor], curvature: Tensor, iterations: int) -> Tensor:
    """Accelerated projected gradient descent on c G c / 2 - c along over c >= 0, restarted where it turns back."""
    here = ahead = torch.zeros_like(along)
    momentum = 1.0
    for _ in range(iterations):
        there = (ahead - (times_gram(ahead) - along) / curvature).clamp_min(0)
        if ((ahead - there) * (there - here)).sum() > 0:  # O'Donoghue and Candes: forget the momentum
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = there + (momentum - 1) / following * (there - here)
        here, momentum = there, following
    return here


def _largest_eigenvalue(atoms_AD: Tensor) -> Tensor:
    """The largest eigenvalue of the atoms' Gram matrix [], by power iteration, with a margin."""
    vector = torch.randn(atoms_AD.shape[1], generator=torch.Generator().manual_seed(0)).to(atoms_AD)
    for _ in range(POWER_ITERATIONS):
        vector = (atoms_AD @ (vector / vector.norm().clamp_min(1e-30))) @ atoms_AD
    return 1.1 * vector.norm().clamp_min(1e-12)
