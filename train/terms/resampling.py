"""Resampling (Bricken et al. 2023): dead latents restart where live ones reconstruct worst.

B rows, F latents. Every N steps, up to a given share of the run, each dead latent takes a row of the batch, drawn with
probability proportional to the square of its loss. Its decoder row becomes the residual of that row at length one, its
encoder row the same direction at a fifth of the mean live length, its bias a fifth of the mean live bias.
Adam's moments stay: those of a long-silent latent have already faded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..sae.extra_modules import StepCounter
from ..sae.step_view import View

RESAMPLING = "resampling"  # name of the extra, and of the knob that is 1 once resampling is over
SHARE = 0.2
FINEST = 2.0**40  # the largest chance as an integer: a million of them fit into 63 bits
SMALLEST = 1e-300


class Resampling(StepCounter):
    """Counts steps, and gives dead latents new weights when they are due."""

    resampled: Tensor

    def __init__(self, every_steps: int) -> None:
        super().__init__()
        self.every_steps = every_steps
        self.register_buffer("resampled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, view: View) -> None:
        self.add_step()
        is_due = self.steps_seen % self.every_steps == 0
        if is_due and not view.side.knob(RESAMPLING, 0.0):
            dead = view.still_dead & view.dead_and_wanted
            resample(view, dead)
            self.resampled += dead.sum()
        view.note("resampled", self.resampled)


def resample(view: View, dead_F: Tensor) -> None:
    """Give some latents new weights; the host draws the random numbers, so that it never waits for a GPU."""
    sae = view.sae
    fresh = normalize(view.residual[drawn_rows(view, len(dead_F))], dim=1)
    # All ranks use the rows of the first: tables must stay the same everywhere.
    fresh = view.side.ranks.sum(fresh if view.side.ranks.rank == 0 else torch.zeros_like(fresh))
    living = ~dead_F
    count = living.sum().clamp_min(1)
    length = (sae.W_enc.norm(dim=1) * living).sum() / count
    bias = (sae.b_enc * living).sum() / count
    sae.W_dec.copy_(torch.where(dead_F[:, None], fresh, sae.W_dec))
    sae.W_enc.copy_(torch.where(dead_F[:, None], SHARE * length * fresh, sae.W_enc))
    sae.b_enc.copy_(torch.where(dead_F, SHARE * bias, sae.b_enc))


def drawn_rows(view: View, count: int) -> Tensor:
    """int64 [count], rows of the batch, each drawn with probability proportional to its squared loss."""
    chances = view.residual.square().sum(1).square().double()
    # Summed as integers: a GPU adds floats in an order that changes from run to run, and a resumed run must draw the
    # same rows.
    ends = (chances / chances.max().clamp_min(SMALLEST) * FINEST).long().cumsum(0)
    generator = view.generator
    drawn = view.draw(lambda: torch.rand(count, generator=generator))
    return torch.searchsorted(ends, (drawn.double() * ends[-1]).long(), right=True).clamp_max(len(ends) - 1)
