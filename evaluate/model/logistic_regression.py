"""Logistic regressions as probes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np


def fitted(rows: np.ndarray, labels: np.ndarray, **settings: Any) -> Any:
    """Fit a regression. As in SAEBench and sae-probes, one that runs out of iterations is taken without a warning."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # here: it takes a second to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(**settings).fit(rows, labels)
