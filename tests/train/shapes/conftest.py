"""Views in float64 on small batches of windows with holes, and slopes by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from saemill.train.cli import main
from saemill.train.data.batch import Batch
from saemill.train.data.scaling import unit_stats
from saemill.train.engine.step import Trainee
from saemill.train.engine.terms_and_constraints import Assembly
from saemill.train.sae.gates import Gate, TopK
from saemill.train.sae.model import SparseAutoencoder
from saemill.train.sae.side_inputs import Side
from saemill.train.sae.step_view import View

WINDOWS, CONTEXT, D, LATENTS = 3, 12, 6, 20
SECOND_DOCUMENT = (12, 7, 4)  # where it starts in each window; 12: nowhere
EPSILON = 1e-6


def window_side(rng: torch.Generator) -> dict[str, Any]:
    has_row = torch.rand(WINDOWS, CONTEXT, generator=rng) > 0.15
    has_row[:, 0] = False
    window, position = has_row.nonzero().unbind(1)
    row_of = torch.full((WINDOWS, CONTEXT), -1)
    row_of[window, position] = torch.arange(len(window))
    document = 2 * window + (position >= torch.tensor(SECOND_DOCUMENT)[window])
    return {"window": window, "position": position, "row_of": row_of, "document": document}


def make_sae(rng: torch.Generator, gate: Gate | None = None) -> SparseAutoencoder:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return SparseAutoencoder(draw(LATENTS, D), draw(LATENTS, D), gate or TopK(6), b_dec=draw(D), b_enc=draw(LATENTS))


def make_views(
    rng: torch.Generator, sae: SparseAutoencoder, dead: Tensor | None = None, **knobs: float
) -> Callable[[], View]:
    """A function that returns fresh views of one batch."""
    side = window_side(rng)
    x = torch.randn(len(side["window"]), D, generator=rng, dtype=torch.float64)
    dead = torch.zeros(LATENTS, dtype=torch.bool) if dead is None else dead
    return lambda: View(x, x, Side(side, knobs), sae, dead, unit_stats(D), rng)


def assert_slopes(loss_of: Callable[[], Tensor], module: nn.Module, rng: torch.Generator, names: tuple[str, ...] = ()):
    """Check the gradient of every parameter (or of those named) by finite differences of the loss."""
    parameters = {n: p for n, p in module.named_parameters() if not names or n in names}
    gradients = torch.autograd.grad(loss_of(), list(parameters.values()), allow_unused=True)
    moving = 0
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * EPSILON)
            values.append(loss_of().detach())
            with torch.no_grad():
                parameter.add_(direction, alpha=-sign * EPSILON)
        found = float((gradient * direction).sum()) if gradient is not None else 0.0
        assert found == pytest.approx(float(values[0] - values[1]) / (2 * EPSILON), rel=1e-4, abs=1e-7), name
        moving += found != 0.0
    assert moving, "no parameter has a slope: nothing was checked"


def same_bits_as(assembly: Assembly, expected: Assembly, batches: list[Batch], steps: int) -> list[str]:
    """The names of weights that differ after some steps."""
    trainees = [Trainee("one", each, steps) for each in (assembly, expected)]
    for batch in batches:
        for trainee in trainees:
            trainee.step(batch)
    found, wanted = (dict(trainee.sae.named_parameters()) for trainee in trainees)
    return [name for name in wanted if not torch.equal(found[name], wanted[name])]


class Shaping:
    """What these tests share."""

    WINDOWS, CONTEXT, D, LATENTS = WINDOWS, CONTEXT, D, LATENTS
    window_side = staticmethod(window_side)
    make_sae = staticmethod(make_sae)
    make_views = staticmethod(make_views)
    assert_slopes = staticmethod(assert_slopes)
    same_bits_as = staticmethod(same_bits_as)


@pytest.fixture
def shaping() -> type[Shaping]:
    return Shaping


@pytest.fixture
def cli(tmp_path):
    """Run the command: `cli("--variant", "tiered", ...)` returns its result."""

    def call(*words):
        return CliRunner().invoke(main, ["--out", str(tmp_path / "runs"), "--device", "cpu", *map(str, words)])

    return call
