"""What each layer's attention says about codes, by layer: explained similarity, and its part in training."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..figures.panels import STEP, draw_parts
from ..figures.records import Record
from ..figures.style import INK, LINES, caption, new_figure, shades

LOGGED = "contribution/layer_"
SHARE, GAIN = "share_", "similarity_gain_"


def layers_of(record: Record) -> list[int]:
    """The layers that the evaluation saw."""
    names = record.documents.get("attention", {}).get("eval_result_metrics", {}).get("contribution", {})
    return sorted(int(name.removeprefix(SHARE)) for name in names if name.startswith(SHARE))


def draw(records: Sequence[Record]) -> Figure | None:
    measured, logged = ([r for r in records if found(r)] for found in (layers_of, lambda r: r.numbered(LOGGED)))
    panels = 2 * bool(measured) + len(logged)
    if not panels:
        return None
    layers = sorted(
        {layer for r in measured for layer in layers_of(r)} | {n for r in logged for n in r.numbered(LOGGED)}
    )
    width = max(5.0, 1.2 + 0.9 * len(measured))
    figure, axes = new_figure(panels, columns=2 if len(logged) in (0, 2) else 3, width=width, height=3.6)
    colours = dict(zip(layers, shades(len(layers)), strict=True))
    if measured:
        titles = {
            SHARE: ("Similarity of codes explained by attention", "% of variance, beyond nearness"),
            GAIN: ("How much more alike attended tokens are", "cosine above the row's mean"),
        }
        for axis, (prefix, (title, unit)) in zip(axes, titles.items(), strict=False):
            parts = {
                f"layer {layer}": [r.metric("attention", f"contribution.{prefix}{layer}") for r in measured]
                for layer in layers
            }
            draw_parts(axis, [r.name for r in measured], parts, list(colours.values()), 100 if prefix == SHARE else 1)
            caption(axis, "", "", unit)
            axis.set_title(title, fontsize=10, color=INK, pad=24)
    for record, axis in zip(logged, axes[2 * bool(measured) :], strict=True):
        for layer, name in record.numbered(LOGGED).items():
            line = LINES[layers.index(layer) % len(LINES)]
            axis.plot(*record.series(name), color=colours[layer], ls=line, lw=1.8, label=f"layer {layer}")
        caption(axis, record.name, STEP, "part of the layer in the guidance")
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle("Contribution by layer", fontsize=12, color=INK)
    return figure
