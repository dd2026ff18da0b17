"""What each layer's attention says about codes, by layer: explained similarity, and its part in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures.panels import draw_layers, draw_parts
from ..figures.records import Record
from ..figures.style import INK, caption, new_figure, shades

LOGGED = "attention/contribution_"
SHARE, GAIN = "share_", "similarity_gain_"


@dataclass(frozen=True)
class Measured:
    """A number of the evaluation `attention`, one for each layer."""

    metric: str
    title: str
    unit: str
    factor: float = 1.0


MEASURED = (
    Measured(SHARE, "Similarity of codes explained by attention", "% of variance, beyond nearness", 100),
    Measured(GAIN, "How much more alike attended tokens are", "cosine above the row's mean"),
)


def measured_layers(record: Record) -> list[int]:
    """The layers that the evaluation saw."""
    names = record.documents.get("attention", {}).get("eval_result_metrics", {}).get("contribution", {})
    return sorted(int(name.removeprefix(SHARE)) for name in names if name.startswith(SHARE))


def draw(records: Sequence[Record]) -> Figure | None:
    measured = [record for record in records if measured_layers(record)]
    logged = [record for record in records if record.numbered(LOGGED)]
    panels = len(MEASURED) * bool(measured) + len(logged)
    if not panels:
        return None
    layers = sorted({layer for r in records for layer in (*measured_layers(r), *r.numbered(LOGGED))})
    width = max(5.0, 1.2 + 0.9 * len(measured))
    figure, axes = new_figure(panels, columns=2 if panels in (2, 4) else 3, width=width, height=3.6)
    if measured:
        for axis, kind in zip(axes, MEASURED, strict=False):
            draw_measured(axis, kind, measured, layers)
    for axis, record in zip(axes[panels - len(logged) :], logged, strict=True):
        draw_layers(axis, record, LOGGED, layers, "share of guided similarity (sum 1)")
    figure.suptitle("Contribution by layer", fontsize=12, color=INK)
    return figure


def draw_measured(axis: Axes, kind: Measured, records: Sequence[Record], layers: Sequence[int]) -> None:
    """What the evaluation found, a group of bars per SAE."""
    parts = {
        f"layer {layer}": [record.metric("attention", f"contribution.{kind.metric}{layer}") for record in records]
        for layer in layers
    }
    draw_parts(axis, [record.name for record in records], parts, shades(len(layers)), kind.factor)
    caption(axis, "", "", kind.unit)
    axis.set_title(kind.title, fontsize=10, color=INK, pad=24)  # above the legend
