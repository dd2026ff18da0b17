"""Probes of order: from the code of a token, where it stands; from two codes, which came first.

N examples, F latents, K latents that a probe may read.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

ITERATIONS = 200


def accuracy(train_NF: Tensor, train_labels_N: Tensor, test_NF: Tensor, test_labels_N: Tensor, k: int | None) -> float:
    """Share of test examples that a logistic regression on the k best latents (None: all) gets right."""
    chosen = slice(None) if k is None else best_latents(train_NF, train_labels_N, k)
    train, test = (_scaled(part[:, chosen], train_NF[:, chosen]) for part in (train_NF, test_NF))
    probe = LogisticRegression(max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe stopped early is still a probe
        probe.fit(train, train_labels_N.cpu().numpy())
    return float(probe.score(test, test_labels_N.cpu().numpy()))


def best_latents(acts_NF: Tensor, labels_N: Tensor, k: int) -> Tensor:
    """int64 [K]: the latents whose means differ most between any class and the rest, in their own spread."""
    spread = acts_NF.std(0).clamp_min(1e-6)
    contrast = torch.stack(
        [(acts_NF[labels_N == c].mean(0) - acts_NF[labels_N != c].mean(0)).abs() for c in labels_N.unique()]
    )
    return (contrast.amax(0) / spread).topk(min(k, acts_NF.shape[1])).indices


def _scaled(table_NK: Tensor, like_NK: Tensor) -> np.ndarray:
    """With the mean and spread of the training examples taken out."""
    scaled = (table_NK - like_NK.mean(0)) / like_NK.std(0).clamp_min(1e-6)
    return scaled.double().cpu().numpy()
