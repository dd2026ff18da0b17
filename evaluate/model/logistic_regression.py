"""Logistic regressions as probes."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import numpy as np

from ...cache_schema.numbers_in_words import counted


def fitted(rows: np.ndarray, labels: np.ndarray, **settings: Any) -> Any:
    """Fit a regression. As in SAEBench and sae-probes, running out of iterations raises no warning."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # here: it takes a second to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(**settings).fit(rows, labels)


def has_converged(regression: Any) -> bool:
    """Whether it had iterations left when it stopped."""
    return bool((regression.n_iter_ < regression.max_iter).all())


def unconverged(converged: Collection[bool]) -> str | None:
    """The remark on a result whose probes ran out of iterations, if any did."""
    left = len(converged) - sum(converged)
    return f"{left:,} of {counted(len(converged), 'probe')} had not converged" if left else None
