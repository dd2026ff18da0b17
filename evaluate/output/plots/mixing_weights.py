"""How much each layer's attention counts in the guidance, over training; a panel per SAE."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..figures.panels import Lines, draw_layers, looks_of, series_of
from ..figures.records import Record
from ..figures.style import INK, new_figure

WEIGHT = "mixing/weight_"


def draw(records: Sequence[Record]) -> Figure | None:
    mixed = [record for record in records if record.numbered(WEIGHT)]
    if not mixed:
        return None
    layers = sorted({layer for record in mixed for layer in record.numbered(WEIGHT)})
    temperature = Lines("Temperature", "softmax temperature", series_of("mixing/temperature"))
    has_temperature = temperature.finds(mixed)
    figure, axes = new_figure(len(mixed) + has_temperature)
    for record, axis in zip(mixed, axes, strict=False):
        axis.set_ylim(-0.02, 1.02)
        draw_layers(axis, record, WEIGHT, layers, "mixing weight (sum 1)")
    if has_temperature:
        temperature.draw(axes[-1], mixed, looks_of(records))
        for text in axes[-1].legend([record.name for record in mixed], fontsize=8, frameon=False).get_texts():
            text.set_parse_math(False)
    figure.suptitle("Mixing of attention layers", fontsize=12, color=INK)
    return figure
