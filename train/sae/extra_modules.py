"""Modules that train beside an SAE's own tables: how fast they learn, and what they are told of a step."""

from __future__ import annotations

from typing import cast

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

    def retired_latents(self) -> Tensor | None:
        """bool [F], latents that must stay silent from now on: the auxiliary loss leaves them alone."""
        return None


def extras_of(sae: SparseAutoencoder) -> list[Extra]:
    return [cast(Extra, extra) for extra in sae.extras.values()]


def retired_of(sae: SparseAutoencoder) -> Tensor | None:
    """bool [F], the latents that an extra has retired; None where no extra retires any."""
    found = (extra.retired_latents() for extra in extras_of(sae))
    return next((retired for retired in found if retired is not None), None)
