"""How well a batch is shuffled: the share of its pairs that come from one document, against the ideal.

The ideal is a batch drawn at random from the whole split. A ratio near 1 means that the pool is as good
as shuffling everything; a ratio of 5 means that two tokens of a batch share a document five times as
often as they should.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def count_pairs(labels: np.ndarray) -> tuple[int, int]:
    """Pairs with equal labels, and all pairs."""
    counts = np.unique(labels, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1)).sum()) // 2, len(labels) * (len(labels) - 1) // 2


@dataclass(frozen=True)
class ShuffleQuality:
    """Pairs counted so far, and what they should have been."""

    ideal: float
    same: int = 0
    pairs: int = 0

    def with_batch(self, labels: np.ndarray) -> ShuffleQuality:
        same, pairs = count_pairs(labels)
        return ShuffleQuality(self.ideal, self.same + same, self.pairs + pairs)

    @property
    def share(self) -> float:
        """The share of pairs from one document."""
        return self.same / self.pairs if self.pairs else 0.0

    @property
    def ratio(self) -> float:
        """Measured over ideal: 1 is perfect. 1 as well where no pair could share a document and none does."""
        if self.ideal == 0.0:
            return 1.0 if self.same == 0 else float("inf")
        return self.share / self.ideal
