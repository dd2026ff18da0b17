"""A probe of the k features that differ most between a class and the rest: one library call each."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from .features import Draw, Features

MAX_ITERATIONS = 1000


def top_features(train: Features, draw: Draw, k: int) -> np.ndarray:
    """The k features with the largest difference of means, in rising order."""
    difference = (train.mean(draw.rows[draw.labels == 1]) - train.mean(draw.rows[draw.labels == 0])).abs()
    return np.sort(torch.argsort(difference, descending=True)[:k].numpy())


def sparse_accuracy(train: Features, train_draw: Draw, test: Features, test_draw: Draw, k: int) -> float:
    """Share of test rows that an L2-regularised logistic regression on k features gets right."""
    chosen = top_features(train, train_draw, k)
    probe = LogisticRegression(C=1.0, max_iter=MAX_ITERATIONS)
    probe.fit(train.columns(train_draw, chosen), train_draw.labels)
    return float(probe.score(test.columns(test_draw, chosen), test_draw.labels))
