"""Which tokens the pocket model sees at which step: a pure function of the step.

Shapes: B windows, T tokens in a window.

1. Each document starts with BOS; documents are one long run of tokens.
2. A pass over the run, for one context T, cuts it at a phase of its own into
   pieces of T tokens and visits them in an order of its own, each once.
3. A window is BOS and the piece but its last token; the piece is what it predicts.
4. Most steps are short; a few in each cycle are long, so that far positions are
   learned too. Every context counts its own passes.
"""

from dataclasses import dataclass

import numpy as np

CYCLE = (128,) * 7 + (512,) + (128,) * 7 + (1024,)  # the context of each step, again and again


@dataclass(frozen=True)
class Batches:
    """All training batches: `batch(step)` needs no state, so a run resumes anywhere."""

    run: np.ndarray  # int64, all training tokens, BOS before each document
    bos: int
    tokens_per_step: int
    seed: int

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs_BT, targets_BT) of one step."""
        context = context_of(step)
        size = self.tokens_per_step // context
        per_pass = (len(self.run) // context - 1) // size
        number, place = divmod(_earlier(step, context), per_pass)
        starts = self._starts(context, number)[place * size : (place + 1) * size]
        targets_BT = self.run[starts[:, None] + np.arange(context)]
        inputs_BT = np.concatenate([np.full((size, 1), self.bos), targets_BT[:, :-1]], axis=1)
        return inputs_BT, targets_BT

    def _starts(self, context: int, number: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, context, number])
        pieces = len(self.run) // context - 1
        return rng.integers(context) + context * rng.permutation(pieces)


def context_of(step: int) -> int:
    return CYCLE[step % len(CYCLE)]


def _earlier(step: int, context: int) -> int:
    """How many steps before this one had the same context."""
    cycles, rest = divmod(step, len(CYCLE))
    return cycles * CYCLE.count(context) + CYCLE[:rest].count(context)
