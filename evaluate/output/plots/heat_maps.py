"""Heat maps, a panel per SAE: latents on the first tokens of a test window, their parts, and which follows which."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...evals.measures.assignment import EQUAL_SHARES
from ..figures.records import Record
from ..figures.style import INK, caption, first_of, new_figure, shown
from .layers_and_tiers import has_no_tiers

BLUES: Any = {"aspect": "auto", "cmap": "Blues", "vmin": 0, "interpolation": "nearest"}
MOST_PATTERNS, MOST_COMPOSITIONS, MOST_MATRICES = 6, 4, 9  # SAEs in one figure: more would be too small to read
LATENTS = 16  # of each whose composition is drawn
LEAST, LIMIT = 1 / 16, 3.0  # smallest multiple of the base rate that is drawn; the scale's ends, in doublings


def draw_each(
    records: Sequence[Record],
    draw: Callable[[Axes, Record], None],
    title: str,
    most: int,
    width: float,
    height: float,
    columns: int = 1,
) -> Figure | None:
    if not records:
        return None
    figure, axes = new_figure(min(most, len(records)), columns, width, height)
    for axis, record in zip(axes, records, strict=False):
        draw(axis, record)
        axis.grid(visible=False)
    figure.suptitle(first_of(title, len(axes), len(records)), fontsize=12, color=INK)
    return figure


def pattern_of(record: Record) -> dict[str, list]:
    return dict(record.unstructured("browser").get("pattern") or {})


def draw_activations(records: Sequence[Record]) -> Figure | None:
    seen = [record for record in records if pattern_of(record).get("latents")]
    return draw_each(seen, draw_pattern, "Activation patterns", MOST_PATTERNS, 9.5, 4.4)


def draw_pattern(axis: Axes, record: Record) -> None:
    """The strongest latents down, tokens across, dark where active."""
    pattern = pattern_of(record)
    image = axis.imshow(pattern["activations"], **BLUES)
    tokens, latents = [shown(token) for token in pattern["tokens"]], pattern["latents"]
    axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7, parse_math=False)
    axis.set_yticks(range(len(latents)), [str(latent) for latent in latents], fontsize=7)
    caption(axis, record.name, "token", "latent")
    bar = axis.figure.colorbar(image, ax=axis, pad=0.01, fraction=0.03)
    bar.set_label("activation", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)


def compositions_of(record: Record) -> list[dict[str, Any]]:
    """Latents and their parts, the best explained first."""
    found = record.unstructured("tiers").get("compositions") or []
    return sorted((dict(one) for one in found if one.get("parts")), key=lambda one: -one["r_squared"])[:LATENTS]


def draw_compositions(records: Sequence[Record]) -> Figure | None:
    seen = [record for record in records if compositions_of(record)]
    parts = (part for record in seen[:MOST_COMPOSITIONS] for one in compositions_of(record) for part in one["parts"])
    heaviest = max((part["weight"] for part in parts), default=0.0)
    draw = partial(draw_composition, heaviest=heaviest)
    figure = draw_each(seen, draw, "What latents are composed of", MOST_COMPOSITIONS, 7.5, 4.4)
    return add_scale(figure, "weight of a part; the number in a cell is the part's")


def draw_composition(axis: Axes, record: Record, heaviest: float) -> None:
    """A row per latent with the numbers of its parts, heaviest first and darkest, on one scale for all panels."""
    latents = compositions_of(record)
    most = max(len(one["parts"]) for one in latents)
    weights = [[part["weight"] for part in one["parts"]] + [0.0] * (most - len(one["parts"])) for one in latents]
    axis.imshow(weights, **BLUES, vmax=heaviest)
    for row, one in enumerate(latents):
        for column, part in enumerate(one["parts"]):
            colour = "white" if part["weight"] > heaviest / 2 else INK
            axis.text(column, row, str(part["latent"]), ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(most), [str(rank + 1) for rank in range(most)], fontsize=7)
    names = [f"{one['latent']} (tier {one['tier']}, R² {one['r_squared']:.2f})" for one in latents]
    axis.set_yticks(range(len(latents)), names, fontsize=7)
    title = f"{record.name} (no tiers: {EQUAL_SHARES} of its latents instead)" if has_no_tiers(record) else record.name
    caption(axis, title, "part of the tier below, by weight", "latent")


def draw_transitions(records: Sequence[Record]) -> Figure | None:
    seen = [record for record in records if record.unstructured("temporal").get("transitions")]
    columns, title = 2 if len(seen) in (2, 4) else 3, "Transitions of the most frequent latents"
    figure = draw_each(seen, draw_matrix, title, MOST_MATRICES, 4.6, 4.2, columns)
    return add_scale(figure, "doublings over the column's base rate")


def add_scale(figure: Figure | None, label: str) -> Figure | None:
    """One colour bar for all panels."""
    if figure is not None:
        bar = figure.colorbar(figure.axes[0].images[0], ax=figure.axes, shrink=0.6, pad=0.02, aspect=30)
        bar.set_label(label, fontsize=8, color=INK)
        bar.ax.tick_params(labelsize=7, colors=INK)
    return figure


def draw_matrix(axis: Axes, record: Record) -> None:
    """log2 of P(column on next token | row) over P(column)."""
    found = record.unstructured("temporal")
    lift = [
        [math.log2(max(value / max(rate, 1e-12), LEAST)) for value, rate in zip(row, found["base_rates"], strict=True)]
        for row in found["transitions"]
    ]
    axis.imshow(lift, cmap="PuOr_r", vmin=-LIMIT, vmax=LIMIT, interpolation="nearest")
    labels = [str(latent) for latent in found["frequent_latents"]]
    axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axis.set_yticks(range(len(labels)), labels, fontsize=6)
    caption(axis, record.name, "latent on the next token", "latent on a token")


PLOTS = {
    "activation_patterns": draw_activations,
    "composition_patterns": draw_compositions,
    "transition_matrix": draw_transitions,
}
