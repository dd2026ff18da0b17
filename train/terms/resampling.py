"""Resampling (Bricken et al. 2023): dead latents begin anew where the living rebuild least.

B rows, F latents. Every N steps, until a part of the run is over, each dead latent takes a row of the batch, drawn with
a chance in proportion to the square of its loss: its decoder row becomes what was left of that row, at length one,
its encoder a fifth of a living latent's length along it, its bias a fifth of a living one's.
Adam's moments are left: those of a latent that has long been silent have faded by themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..data.device_copies import send
from ..sae.extra_modules import StepCounter
from ..sae.step_view import View

RESAMPLING = "resampling"  # the extra, and the knob that says whether it is over: 1 from there on
SHARE = 0.2
FINEST = 2.0**40  # parts of the largest chance: a million rows of it are within 63 bits
SMALLEST = 1e-300


class Resampling(StepCounter):
    """Counts steps, and gives dead latents new weights when it is time."""

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
    """New weights for some latents; the host draws, so that nothing is waited for."""
    sae = view.sae
    fresh = normalize(view.residual[drawn_rows(view, len(dead_F))], dim=1)
    # All ranks take the rows of the first: tables must stay the same everywhere.
    fresh = view.side.ranks.sum(fresh if view.side.ranks.rank == 0 else torch.zeros_like(fresh))
    living = ~dead_F
    count = living.sum().clamp_min(1)
    length = (sae.W_enc.norm(dim=1) * living).sum() / count
    bias = (sae.b_enc * living).sum() / count
    sae.W_dec.copy_(torch.where(dead_F[:, None], fresh, sae.W_dec))
    sae.W_enc.copy_(torch.where(dead_F[:, None], SHARE * length * fresh, sae.W_enc))
    sae.b_enc.copy_(torch.where(dead_F, SHARE * bias, sae.b_enc))


def drawn_rows(view: View, count: int) -> Tensor:
    """int64 [count], rows of the batch, each drawn with a chance in proportion to its squared loss."""
    chances = view.residual.square().sum(1).square().double()
    # Summed as whole numbers: a GPU adds the floats of a vector in an order that changes from run to run, and so may
    # the row at the end of a sum, which a run that was resumed must draw again.
    ends = (chances / chances.max().clamp_min(SMALLEST) * FINEST).long().cumsum(0)
    dice = send(torch.rand(count, generator=view.generator), ends.device)
    return torch.searchsorted(ends, (dice.double() * ends[-1]).long(), right=True).clamp_max(len(ends) - 1)
