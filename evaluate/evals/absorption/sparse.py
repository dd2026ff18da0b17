"""Which latents stand for a letter. N rows, F latents, K of them.

1. A probe with an L1 penalty is fitted on the latents, all letters at once.
2. For each letter its latents are ranked by weight, the largest first; negative weights rank last.
3. A logistic regression on the first k says how well k latents predict the letter, by F1 on the test words.
4. k grows while F1 gains more than a threshold over the best so far: those latents are the letter's, and
   more than one means that the feature was split.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .probe import Probe


@dataclass(frozen=True)
class LetterLatents:
    """The latents of a letter, and the F1 of each number of them that was tried."""

    latents: tuple[int, ...]
    f1: tuple[float, ...]


def ranked_latents(sparse_probe: Probe, max_k: int) -> Tensor:
    """int64 [L, K]: for each letter the latents with the largest weights (not the largest in size)."""
    return sparse_probe.weights.topk(max_k, dim=1).indices


def choose_latents(
    ranked_K: Sequence[int],
    train_NK: np.ndarray,
    is_train: np.ndarray,
    test_NK: np.ndarray,
    is_test: np.ndarray,
    jump: float,
) -> LetterLatents:
    """The letter's latents; columns of the activations are those of `ranked_K`.

    Larger k than the first that does not gain enough are not looked at, so they are not fitted either.
    """
    best, scores = -100.0, []
    for k in range(1, len(ranked_K) + 1):
        scores.append(_f1_of_first(k, train_NK, is_train, test_NK, is_test))
        if scores[-1] <= best + jump:
            return LetterLatents(tuple(ranked_K[: k - 1]), tuple(scores))
        best = scores[-1]
    return LetterLatents(tuple(ranked_K), tuple(scores))


def f1_score(truth: np.ndarray, claimed: np.ndarray) -> float:
    """Harmonic mean of precision and recall; 0 where nothing was found."""
    hits = int((truth & claimed).sum())
    return 2 * hits / (int(truth.sum()) + int(claimed.sum())) if hits else 0.0


def _f1_of_first(k: int, train_NK: np.ndarray, is_train: np.ndarray, test_NK: np.ndarray, is_test: np.ndarray) -> float:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # here: it takes a second to import

    regression = LogisticRegression(max_iter=500, class_weight="balanced")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # SAEBench takes what 500 iterations give
        regression.fit(train_NK[:, :k], is_train.astype(np.int64))
    return f1_score(is_test, regression.decision_function(test_NK[:, :k]) > 0.0)
