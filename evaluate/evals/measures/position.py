"""Latents and positions: does a latent keep to its range, and does its profile have the intended shape? Order probes.

W windows, T context, F latents, R ranges. Range r is the positions [r T / R, (r + 1) T / R). An SAE trained without
ranges is assigned them afterwards, each latent the one with most of its activation: the control that a mask has to
beat. They are chosen on different windows from those they are measured on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...model.logistic_regression import fitted, has_converged

ANYWHERE = -1  # the range of a latent that no mask binds


def equal_shares(length: int, count: int) -> Tensor:
    """int64 [length]: in which of `count` equal shares each position lies."""
    return torch.arange(length) * count // length


@dataclass(frozen=True, eq=False)
class Profile:
    """Activation by position."""

    mass: Tensor  # float64 [T, F], sum of activations
    firings: Tensor  # int64 [F]
    tokens: Tensor  # float64 [T], tokens that took part

    @property
    def mean(self) -> Tensor:
        """Mean activation at each position; 0 where no token took part."""
        return self.mass / self.tokens.clamp_min(1)[:, None]


def profile(acts_WTF: Tensor, keep_WT: Tensor, before: Profile | None = None) -> Profile:
    """The profile of a batch; or `before`, with the batch added in place, because for wide SAEs it takes gigabytes."""
    acts = torch.where(keep_WT[:, :, None], acts_WTF, 0.0)
    mass, firings, tokens = acts.sum(0), (acts > 0).sum((0, 1)), keep_WT.sum(0)
    if before is None:
        return Profile(mass.double(), firings, tokens.double())
    before.mass.add_(mass)
    before.firings.add_(firings)
    before.tokens.add_(tokens)
    return before


def assign_ranges(seen: Profile, ranges: int) -> Tensor:
    """int64 [F]: for each latent the range where its mean activation is highest."""
    return _by_range(seen, ranges).argmax(0)


def retention(seen: Profile, range_F: Tensor, ranges: int) -> Tensor:
    """[F]: share of a latent's activation that lies inside its range; 1 for a latent bound to none.

    By mean activation at each position, so that windows that end early do not favour the first ranges.
    """
    share = _by_range(seen, ranges)
    share = share / share.sum(0).clamp_min(1e-30)
    inside = share.gather(0, range_F.clamp_min(0)[None])[0]
    return torch.where(range_F == ANYWHERE, 1.0, inside)


def hard_mask(range_F: Tensor, context: int, ranges: int) -> Tensor:
    """float64 [T, F]: 1 inside a latent's range, everywhere for a latent bound to none."""
    inside = equal_shares(context, ranges).to(range_F.device)[:, None] == range_F
    return (inside | (range_F == ANYWHERE)).double()


def soft_mask(centre_F: Tensor, sigma: Tensor | float, context: int) -> Tensor:
    """float64 [T, F]: exp(-(p - centre)^2 / (2 sigma^2))."""
    place = torch.arange(context, dtype=torch.float64, device=centre_F.device)
    return torch.exp(-((place[:, None] - centre_F.double()) ** 2) / (2 * torch.as_tensor(sigma).double() ** 2))


def fidelity(seen: Profile, mask_TF: Tensor) -> Tensor:
    """[F]: correlation over positions of a latent's mean activation with its mask; NaN where either is flat."""
    has_tokens = seen.tokens > 0
    return _correlation(seen.mean[has_tokens], mask_TF[has_tokens])


def _by_range(seen: Profile, ranges: int) -> Tensor:
    """[R, F]: mean over those positions of each range that have tokens; that of BOS has none."""
    of_position = equal_shares(len(seen.tokens), ranges).to(seen.mass.device)
    total = seen.mass.new_zeros(ranges, seen.mass.shape[1]).index_add(0, of_position, seen.mean)
    return total / torch.bincount(of_position[seen.tokens > 0], minlength=ranges).clamp_min(1)[:, None]


def _correlation(first_TF: Tensor, second_TF: Tensor) -> Tensor:
    first, second = (table - table.mean(0) for table in (first_TF, second_TF))
    lengths = first.norm(dim=0) * second.norm(dim=0)
    return torch.where(lengths > 1e-12, (first * second).sum(0) / lengths.clamp_min(1e-30), torch.nan)


ITERATIONS = 200


def accuracy(
    train_NF: Tensor, train_labels_N: Tensor, test_NF: Tensor, test_labels_N: Tensor, k: int | None
) -> tuple[float, bool]:
    """Share of test examples that a logistic regression on the k best latents (None: all) gets right, and whether it
    converged."""
    chosen = slice(None) if k is None else best_latents(train_NF, train_labels_N, k)
    train, test = (_scaled(part[:, chosen], train_NF[:, chosen]) for part in (train_NF, test_NF))
    probe = fitted(train, train_labels_N.cpu().numpy(), max_iter=ITERATIONS)
    return float(probe.score(test, test_labels_N.cpu().numpy())), has_converged(probe)


def best_latents(acts_NF: Tensor, labels_N: Tensor, k: int) -> Tensor:
    """int64 [K]: the latents whose means differ most between any class and the rest, relative to their spread."""
    spread = acts_NF.std(0).clamp_min(1e-6)
    contrast = torch.stack(
        [(acts_NF[labels_N == c].mean(0) - acts_NF[labels_N != c].mean(0)).abs() for c in labels_N.unique()]
    )
    return (contrast.amax(0) / spread).topk(min(k, acts_NF.shape[1])).indices


def _scaled(table_NK: Tensor, like_NK: Tensor) -> np.ndarray:
    """Standardised by the mean and spread of the training examples."""
    scaled = (table_NK - like_NK.mean(0)) / like_NK.std(0).clamp_min(1e-6)
    return scaled.double().cpu().numpy()
