"""Which of the most frequent latents follows which on the next token; a panel per SAE."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ..figures.records import Record
from ..figures.style import INK, caption, new_figure

MOST = 9
LEAST, LIMIT = 1 / 16, 3.0  # times the base rate that is drawn as nothing; the scale's ends, in doublings


def draw(records: Sequence[Record]) -> Figure | None:
    seen = [record for record in records if record.unstructured("temporal").get("transitions")][:MOST]
    if not seen:
        return None
    figure, axes = new_figure(len(seen), columns=2 if len(seen) in (2, 4) else 3, width=4.6, height=4.2)
    images = [draw_matrix(axis, record) for record, axis in zip(seen, axes, strict=True)]
    bar = figure.colorbar(images[0], ax=axes, shrink=0.6, pad=0.02)
    bar.set_label("doublings over the column's base rate", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)
    figure.suptitle("Transitions of the most frequent latents", fontsize=12, color=INK)
    return figure


def draw_matrix(axis: Axes, record: Record) -> AxesImage:
    """log2 of P(column on next token | row) over P(column)."""
    found = record.unstructured("temporal")
    lift = [
        [math.log2(max(value / max(rate, 1e-12), LEAST)) for value, rate in zip(row, found["base_rates"], strict=True)]
        for row in found["transitions"]
    ]
    image = axis.imshow(lift, cmap="PuOr_r", vmin=-LIMIT, vmax=LIMIT, interpolation="nearest")
    labels = [str(latent) for latent in found["frequent_latents"]]
    axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axis.set_yticks(range(len(labels)), labels, fontsize=6)
    axis.grid(visible=False)
    caption(axis, record.name, "latent on the next token", "latent on a token")
    return image
