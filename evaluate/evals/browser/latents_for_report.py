"""What a run's report and plots show about latents: the contexts of a few, and a pattern of one window.

Latents are spread evenly over how often they fire, from the rarest that fired a few times to the commonest. A pattern
shows the strongest latents of the first tokens of the first window. T tokens, F latents.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..measures.token_text import Vocabulary
from .collect_firings import TOP, Firings, Seen

LATENTS, CONTEXTS, LEAST_FIRINGS = 24, 6, 5
BEFORE, AFTER = 16, 8  # tokens of a context
PATTERN_LATENTS = 24


def contexts(
    seen: Seen, kept: Firings, reasons: np.ndarray, tokens_WT: np.ndarray, words: Vocabulary
) -> list[dict[str, Any]]:
    """The strongest contexts of some latents, the rarest first."""
    listed = []
    top = np.flatnonzero(reasons & TOP)
    order = np.argsort(seen.fired, kind="stable")
    order = order[seen.fired[order] >= LEAST_FIRINGS]
    chosen = order if len(order) <= LATENTS else order[np.linspace(0, len(order) - 1, LATENTS).astype(int)]
    for latent in chosen.tolist():
        found = []
        for number in top[kept.latent[top] == latent][:CONTEXTS]:
            row, at = tokens_WT[kept.window[number]], int(kept.at[number])
            parts = row[max(0, at - BEFORE) : at], row[at : at + 1], row[at + 1 : at + 1 + AFTER]
            text = dict(zip(("before", "token", "after"), map(words.write, parts), strict=True))
            found.append({"activation": float(kept.peak[number]), **text})
        listed.append({"latent": latent, "fired_share": float(seen.fired[latent] / seen.tokens), "contexts": found})
    return listed


def pattern(seen: Seen, tokens_WT: np.ndarray, words: Vocabulary) -> dict[str, Any]:
    """The first tokens of the first window against their strongest latents, in order of first firing."""
    acts_TF, positions = seen.beginning
    strongest = acts_TF.max(0, initial=0)
    latents = np.argsort(-strongest, kind="stable")[:PATTERN_LATENTS]
    latents = latents[strongest[latents] > 0]
    latents = latents[np.argsort((acts_TF[:, latents] > 0).argmax(0), kind="stable")] if len(latents) else latents
    return {
        "tokens": [words.write(tokens_WT[0, [position]]) for position in positions],
        "positions": positions.tolist(),
        "latents": latents.tolist(),
        "activations": [[round(float(value), 4) for value in row] for row in acts_TF[:, latents].T],
    }
