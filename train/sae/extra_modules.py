"""Modules that train along with an SAE's own tables: their learning rates, and how they observe steps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from ..data.device_copies import refuse_recording
from .model import SparseAutoencoder
from .step_view import View

DECAY = 0.99  # of running means


class Part(nn.Module):
    """A module with its own learning rate."""

    lr_scale: float = 1.0
    """Multiple of the SAE's learning rate, for the parameters of this module."""
    unscaled: tuple[str, ...] = ()
    """Names of its parameters that keep the SAE's own learning rate."""


class Extra(Part):
    """Is trained and saved with the SAE, but needed by no activation; terms read `view.sae.extras[name]`."""

    is_recordable: ClassVar[bool] = False
    """Whether a GPU may record its part of a step and replay it: the host keeps nothing of one step for the next,
    and what it decides or tells the GPU comes from knobs alone. Subclasses inherit it."""

    def observe(self, view: View) -> None:
        """Called once after each step, without gradient; `view.note` writes numbers to the log."""

    def retired_latents(self, knobs: Mapping[str, float]) -> Tensor | None:
        """bool [F], latents that auxiliary losses must not revive at this step."""
        return None


class StepCounter(Extra):
    """Counts steps in a buffer whose value the host knows.

    A GPU is read only after something else has written to the buffer, such as loading a state.
    """

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._seen: tuple[Tensor, int, int] | None = None  # the buffer, its version, its value

    @property
    def steps_seen(self) -> int:
        refuse_recording("it counts steps on the host")
        steps = self.steps
        if self._seen is None or self._seen[0] is not steps or self._seen[1] != steps._version:
            self._seen = steps, steps._version, int(steps)
        return self._seen[2]

    @property
    def weight_of_step(self) -> float:
        """Weight of the newest step in running means; early steps weigh the same, so means do not start near zero."""
        return max(1.0 - DECAY, 1.0 / (self.steps_seen + 1))

    def add_step(self) -> None:
        count = self.steps_seen + 1
        self.steps += 1
        self._seen = self.steps, self.steps._version, count


def extras_of(sae: SparseAutoencoder) -> list[Extra]:
    return [cast(Extra, extra) for extra in sae.extras.values()]


def retired_of(sae: SparseAutoencoder, knobs: Mapping[str, float]) -> Tensor | None:
    """bool [F], the latents that any extra retires at this step; None if no extra retires any."""
    found = [retired for extra in extras_of(sae) if (retired := extra.retired_latents(knobs)) is not None]
    return reduce(torch.logical_or, found) if found else None
