"""Which latents belong to the topic that is to be forgotten."""

from __future__ import annotations

import numpy as np


def topic_latents(forget_F: np.ndarray, retain_F: np.ndarray, retain_threshold: float) -> np.ndarray:
    """Latents by falling share on the forget text, without those that fire on the retain text too.

    Latents that fire on at least `retain_threshold` of the retain tokens, or never on the forget text,
    are left out. Among equal shares the higher index comes first: a rising stable sort read backwards.
    """
    scores = np.where(retain_F >= retain_threshold, 0.0, forget_F)
    rising = scores.argsort(kind="stable")
    return rising[::-1][: np.count_nonzero(scores)]
