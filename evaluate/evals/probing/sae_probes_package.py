"""The data sets of the package `sae-probes`, prompts with one of two labels, and its probes for them.

Its wheel contains the data as compressed tables. They are read where the package is installed; none of its code is
imported, and none of its dependencies are needed.

Probes are logistic regressions whose regularisation is chosen on part of the training rows, as sae-probes does:
1. Train and test rows are drawn from one generator, half of each label.
2. For ten strengths of regularisation a probe is fitted on part of the training rows and judged by its area under the
   curve on the rest: the last rows, or six folds where there are few.
3. The best strength is fitted on all training rows, and scored on the test rows.
"""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import torch
from scipy.sparse import csr_matrix
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold

from ...errors import DataMissing
from ...model.logistic_regression import fitted, has_converged
from .draw_classes import BinarySet

PACKAGE = "sae_probes"
INDEX = "probing_datasets_MASTER.csv.zst"
INSTALL = "pip install --no-deps sae-probes"


def names() -> tuple[str, ...]:
    """Every binary data set of the collection, in its own order."""
    rows = _read(data_folder() / INDEX)
    return tuple(
        Path(row["Dataset save name"]).name.split(".")[0] for row in rows if row["Data type"] == "Binary Classification"
    )


def load(name: str) -> BinarySet:
    rows = _read(data_folder() / "cleaned_data" / f"{name}.csv.zst")
    return BinarySet(name, [row["prompt"] for row in rows], as_labels([row["target"] for row in rows]))


def as_labels(targets: Sequence[str]) -> np.ndarray:
    """0 for the first of the two values in their order, 1 for the other."""
    values, labels = np.unique(np.array(targets), return_inverse=True)
    if len(values) != 2:
        raise DataMissing(f"expected two labels, found {len(values)}: the data set is not binary")
    return labels


def revision() -> dict[str, str] | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return {"sae-probes": importlib.metadata.version("sae-probes")}
    return None


def data_folder() -> Path:
    """Where the package keeps its data, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) / "data" for folder in (spec.submodule_search_locations or () if spec else ())]
    for folder in folders:
        if (folder / INDEX).is_file():
            return folder
    raise DataMissing(
        f"the data sets of sae-probes are not installed: `{INSTALL}` installs them. "
        "`--set sparse_probing_sae_probes.data=stdlib` probes with text of this Python instead"
    )


@lru_cache(maxsize=2)  # the index and one data set
def _read(file: Path) -> list[Mapping[str, str]]:
    csv.field_size_limit(sys.maxsize)  # prompts may be longer than the default
    try:
        with pyarrow.input_stream(str(file), compression="zstd") as stream:
            return list(csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8", newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataMissing(
            f"{file.name} of sae-probes cannot be read ({error}): install it again, `{INSTALL}`"
        ) from error


Penalty = Literal["l1", "l2"]

STRENGTHS = np.logspace(5, -5, 10)
MAX_ITERATIONS = 1000
MOST_ROWS, MOST_TRAIN, LEAST_TEST = 5000, 1024, 100
EPSILON = 1e-6


@dataclass(frozen=True, eq=False)
class Split:
    train: np.ndarray  # int64
    test: np.ndarray


@dataclass(frozen=True)
class Scores:
    test_accuracy: float
    test_auc: float
    test_f1: float
    has_converged: bool
    """Whether the scored probe did, not those that chose its strength."""

    def to_json(self) -> dict[str, float]:
        """Under SAEBench's keys."""
        return {"test_accuracy": self.test_accuracy, "test_auc": self.test_auc, "test_f1": self.test_f1}


def split_rows(labels: np.ndarray, seed: int) -> Split:
    """Half of each label in both parts; drawn from the first `MOST_ROWS`."""
    rng = np.random.RandomState(seed)
    num_train = min(len(labels) - LEAST_TEST, MOST_TRAIN)
    labels = labels[:MOST_ROWS]
    positive, negative = np.where(labels == 1)[0], np.where(labels == 0)[0]
    train_positive, train_negative = _halves(rng, positive, negative, num_train)
    rest = np.setdiff1d(positive, train_positive), np.setdiff1d(negative, train_negative)
    test = _halves(rng, *rest, len(labels) - num_train - 1)
    train_rows = rng.permutation(np.concatenate([train_positive, train_negative]))
    return Split(train_rows, rng.permutation(np.concatenate(test)))


def rank_latents(acts: csr_matrix, labels: np.ndarray) -> np.ndarray:
    """Latents by the difference of their means, in units of each one's mean where it fires; largest first."""
    counts = acts.getnnz(axis=0)
    unit = np.asarray(abs(acts).sum(axis=0)).ravel() / (counts + EPSILON) + EPSILON
    means = [np.asarray(acts[labels == label].mean(axis=0)).ravel() for label in (1, 0)]
    difference = torch.from_numpy(np.abs((means[0] - means[1]) / unit).astype(np.float32))
    return torch.argsort(difference, descending=True).numpy()


def tuned_scores(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, penalty: Penalty, seed: int
) -> Scores:
    """Scores of the probe with the strength that does best on held-out training rows."""
    held_out = [_mean_auc(train, train_labels, strength, penalty, seed) for strength in STRENGTHS]
    order = np.random.RandomState(seed).permutation(len(train))
    best = float(STRENGTHS[int(np.argmax(held_out))])
    probe = _fitted(train[order], train_labels[order], best, penalty, seed)
    predicted = probe.predict(test)
    return Scores(
        test_accuracy=float(np.mean(np.equal(predicted, test_labels))),
        test_auc=float(roc_auc_score(test_labels, probe.predict_proba(test)[:, 1])),
        test_f1=float(f1_score(test_labels, predicted, average="weighted")),
        has_converged=has_converged(probe),
    )


def _halves(
    rng: np.random.RandomState, positive: np.ndarray, negative: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    num_positive = math.ceil(0.5 * count)
    chosen = rng.choice(positive, size=num_positive, replace=False)
    return chosen, rng.choice(negative, size=count - num_positive, replace=False)


def _mean_auc(rows: np.ndarray, labels: np.ndarray, strength: float, penalty: Penalty, seed: int) -> float:
    found = []
    for fit, held_out in _folds(rows, labels, seed):
        probe = _fitted(rows[fit], labels[fit], strength, penalty, seed)
        found.append(roc_auc_score(labels[held_out], probe.predict_proba(rows[held_out])[:, 1]))
    return float(np.mean(found))


def _folds(rows: np.ndarray, labels: np.ndarray, seed: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit on, and rows to judge by."""
    if len(rows) < 128:
        return StratifiedKFold(n_splits=6, shuffle=True, random_state=seed).split(rows, labels)
    first = len(rows) - min(int(0.2 * len(rows)), 100)
    return [(np.arange(first), np.arange(first, len(rows)))]


def _fitted(rows: np.ndarray, labels: np.ndarray, strength: float, penalty: Penalty, seed: int) -> Any:
    options = {"l1_ratio": 1.0, "solver": "saga"} if penalty == "l1" else {}
    return fitted(rows, labels, C=strength, random_state=seed, max_iter=MAX_ITERATIONS, **options)
