"""The training loop.

1. Draw the step's batch; every SAE of the fleet takes its step on it.
2. Measure and show; save when it is time; stop when a signal asks for it.
3. After the last step: validate on held-out text, save the SAEs, write the results.
"""

from __future__ import annotations

from ..disk.safe_checkpoints import list_checkpoints
from ..errors import MemoryTooSmall, StoppedElsewhere
from .checkpoint_times import catch_signals
from .results import Outcome, conclude
from .run import Run


def train(run: Run) -> Outcome | None:
    """Train from the fleet's step to the last; rank 0 returns the results."""
    try:
        run.watch.begin()
        with catch_signals() as caught:
            for step in range(run.fleet.steps_taken, run.total_steps):
                _take_step(run, step)
                run.saver.save_if_due(step + 1, run.total_steps, caught)
            run.watch.end()
        return conclude(run)
    except (StoppedElsewhere, MemoryTooSmall) as error:
        saved = f"The last checkpoint is whole: go on with: sae-train --resume {run.folder.path}"
        if not list_checkpoints(run.folder.checkpoints):
            saved = "No checkpoint had been written"
        raise type(error)(f"{error}. {saved}") from error


def _take_step(run: Run, step: int) -> None:
    """What was drawn goes with the step: it holds what the feed is to give back at the end."""
    draw = run.feed.draw(step)
    run.watch.observe(step, draw, run.fleet.step(draw))
