"""How long latents stay on, over training and at the end, and how many are on at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures.panels import Lines, Looks, draw_panels, series_of
from ..figures.records import Record
from ..figures.style import caption, log_axis


@dataclass(frozen=True)
class Spread:
    """The share of latents with at most a given value, as a rising line for each SAE."""

    title: str
    x: str
    values: str  # in the unstructured part of the evaluation `temporal`

    def finds(self, records: Sequence[Record]) -> bool:
        return any(record.unstructured("temporal").get(self.values) for record in records)

    def draw(self, axis: Axes, records: Sequence[Record], looks: Looks) -> None:
        for record in records:
            values = sorted(record.unstructured("temporal").get(self.values, ()))
            shares = [100 * (place + 1) / len(values) for place in range(len(values))]
            axis.step(values, shares, where="post", **looks[record.name].strokes)
        log_axis(axis, "x")
        caption(axis, self.title, self.x, "% of latents at or below")


PANELS = (
    Lines("Feature lifetime", "mean over stretches (tokens)", series_of("temporal/lifetime")),
    Lines("Feature sparsity", "L0 (active latents per token)", series_of("l0")),
    Spread("Lifetime of latents, test text", "mean of a latent (tokens)", "lifetimes"),
    Spread("Stability of latents, test text", "P(on next | on) over base rate", "stabilities"),
)


def draw(records: Sequence[Record]) -> Figure | None:
    return draw_panels(PANELS, records, "Features in time")
