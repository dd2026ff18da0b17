"""Modules that train beside an SAE's own tables: how fast they learn, and what they are told of a step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from .model import SparseAutoencoder
from .step_view import View


class Part(nn.Module):
    """A module with a learning rate of its own."""

    lr_scale: float = 1.0
    """Multiple of the SAE's learning rate, for the parameters of this module."""
    unscaled: tuple[str, ...] = ()
    """Those of its parameters that learn at the SAE's own rate all the same."""


class Extra(Part):
    """Trains along and is saved beside the SAE, but no activation needs it; terms read `view.sae.extras[name]`."""

    def observe(self, view: View) -> None:
        """Called once after each step, without gradient; `view.note` writes numbers to the log."""

    def retired_latents(self, knobs: Mapping[str, float]) -> Tensor | None:
        """bool [F], latents that auxiliary losses leave alone at this step: silent for good, or not theirs to wake."""
        return None


def extras_of(sae: SparseAutoencoder) -> list[Extra]:
    return [cast(Extra, extra) for extra in sae.extras.values()]


def retired_of(sae: SparseAutoencoder, knobs: Mapping[str, float]) -> Tensor | None:
    """bool [F], the latents that any extra retires at this step; None where none retires any."""
    found = [retired for extra in extras_of(sae) if (retired := extra.retired_latents(knobs)) is not None]
    return reduce(torch.logical_or, found) if found else None
