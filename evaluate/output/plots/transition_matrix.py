"""Which of the most frequent latents follows which on the next token; a panel per SAE."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures.panels import draw_each
from ..figures.records import Record
from ..figures.style import INK, caption

MOST = 9
LEAST, LIMIT = 1 / 16, 3.0  # multiple of the base rate that is drawn as nothing; the scale's ends, in doublings


def draw(records: Sequence[Record]) -> Figure | None:
    seen = [record for record in records if record.unstructured("temporal").get("transitions")][:MOST]
    title, columns = "Transitions of the most frequent latents", 2 if len(seen) in (2, 4) else 3
    figure = draw_each(seen, draw_matrix, title, columns, width=4.6, height=4.2)
    if figure is not None:
        bar = figure.colorbar(figure.axes[0].images[0], ax=figure.axes, shrink=0.6, pad=0.02)
        bar.set_label("doublings over the column's base rate", fontsize=8, color=INK)
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
    axis.grid(visible=False)
    caption(axis, record.name, "latent on the next token", "latent on a token")
