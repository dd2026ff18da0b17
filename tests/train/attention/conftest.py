"""A small batch of windows with holes, its attention, and a view of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from saemill.train.data.batch import AttentionRows
from saemill.train.data.scaling import unit_stats
from saemill.train.sae.gates import Gate, TopK
from saemill.train.sae.kernels.window_gram import Places
from saemill.train.sae.model import SparseAutoencoder
from saemill.train.sae.side_inputs import Side
from saemill.train.sae.step_view import View

WINDOWS, CONTEXT, HEADS, D, LATENTS = 3, 9, 2, 6, 14
LAYERS = (17, 18, 20)


@dataclass(frozen=True)
class Windows:
    """Windows of CONTEXT places, some of which have no row; dense attention [W, H, T, T] of each layer."""

    row_of: Tensor
    places: Places
    dense: dict[int, Tensor]
    attention: dict[int, AttentionRows]

    @property
    def rows(self) -> int:
        return len(self.places.window)

    @property
    def side(self) -> dict[str, Any]:
        places = self.places
        return {
            "window": places.window,
            "position": places.position,
            "row_of": places.row_of,
            "attention": self.attention,
        }


def make_windows(rng: torch.Generator, windows: int = WINDOWS, heads: int = HEADS, dtype=torch.float32) -> Windows:
    has_row = torch.rand(windows, CONTEXT, generator=rng) > 0.15
    has_row[:, 0] = False
    window, position = has_row.nonzero().unbind(1)
    row_of = torch.full((windows, CONTEXT), -1)
    row_of[window, position] = torch.arange(len(window))
    dense = {layer: make_attention(rng, windows, heads).to(dtype) for layer in LAYERS}
    attention = {layer: as_rows(table) for layer, table in dense.items()}
    return Windows(row_of, Places(window, position, row_of), dense, attention)


def make_attention(rng: torch.Generator, windows: int, heads: int) -> Tensor:
    """Causal, sparse attention with a strong sink, which takes almost all of some rows."""
    scores = 2 * torch.randn(windows, heads, CONTEXT, CONTEXT, generator=rng)
    scores[..., 0] += 8.0 * (torch.rand(windows, 1, CONTEXT, generator=rng) > 0.7)
    causal = torch.ones(CONTEXT, CONTEXT).tril().bool()
    probs = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    return torch.where(probs >= probs.topk(4, dim=-1).values[..., -1:], probs, 0.0)


def as_rows(dense: Tensor) -> AttentionRows:
    kept = dense > 0
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(-1).flatten().cumsum(0)])
    return AttentionRows(indptr, kept.nonzero()[:, 3], dense[kept], dense.sum(-1))


def view_of(
    windows: Windows, rng: torch.Generator, gate: Gate | None = None, dtype=torch.float32, **knobs: float
) -> View:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=dtype)

    sae = SparseAutoencoder(draw(LATENTS, D), draw(LATENTS, D), gate or TopK(4), b_dec=draw(D), b_enc=draw(LATENTS))
    x, dead = draw(windows.rows, D), torch.zeros(LATENTS, dtype=torch.bool)
    return View(x, x, Side(windows.side, knobs), sae, dead, unit_stats(D), rng)


def oracle_links(windows: Windows, layer: int, head: int | None = None, min_mass: float = 0.05) -> Tensor:
    """[B, B]: A^l by its definition, row by row."""
    dense, row_of = windows.dense[layer].double(), windows.row_of
    table = torch.zeros(windows.rows, windows.rows, dtype=torch.float64)
    for window in range(len(row_of)):
        for query in range(CONTEXT):
            row = int(row_of[window, query])
            probs = dense[window, :, query].mean(0) if head is None else dense[window, head, query]
            kept = {int(row_of[window, key]): float(probs[key]) for key in range(1, query) if row_of[window, key] >= 0}
            mass = sum(kept.values())
            if row >= 0 and mass >= min_mass:
                for column, probability in kept.items():
                    table[row, column] = probability / mass
    return table


class Guidance:
    """What these tests share."""

    LAYERS, CONTEXT, D, LATENTS = LAYERS, CONTEXT, D, LATENTS
    make_windows = staticmethod(make_windows)
    view_of = staticmethod(view_of)
    oracle_links = staticmethod(oracle_links)
    as_rows = staticmethod(as_rows)


@pytest.fixture
def guidance() -> type[Guidance]:
    return Guidance
