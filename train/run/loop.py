"""The training loop.

1. Draw the step's batch; every SAE of the fleet takes its step on it.
2. Measure and show; save when it is time; stop when a signal says so.
3. After the last step: validate on held-out text, save the SAEs, write what came out.
"""

from __future__ import annotations

from .checkpoints import signals_caught
from .outcome import Outcome, conclude
from .run import Run


def train(run: Run) -> Outcome | None:
    """From wherever the fleet stands to the end; rank 0 returns what came out."""
    run.watch.begin()
    with signals_caught() as caught:
        for step in range(run.fleet.steps_taken, run.total_steps):
            draw = run.feed.draw(step)
            reports = run.fleet.step(draw)
            run.watch.observe(step, draw, reports)
            run.keeper.keep(step + 1, run.total_steps, caught)
    return conclude(run)
