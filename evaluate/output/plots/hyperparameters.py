"""What was set differently: learning rate, sparsity penalty or target, schedules of both where they move."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..figures.panels import Bars, Lines, draw_panels, first_series, series_of
from ..figures.records import Record

PENALTIES = ("weight/l1", "weight/lp", "weight/l0", "weight/gate_l1")

PANELS = (
    Bars("Learning rate", "peak of its schedule", lambda r: max(r.series("lr")[1], default=None), "{:.2e}"),
    Bars("Sparsity penalty", "coefficient", lambda r: r.setting("penalty")),
    Bars("Sparsity target", "active latents per token", lambda r: r.asked_l0),
    Lines("Learning rate over training", "learning rate", series_of("lr")),
    Lines("Sparsity penalty over training", "coefficient", first_series(PENALTIES)),
)


def draw(records: Sequence[Record]) -> Figure | None:
    return draw_panels(PANELS, records, "Hyperparameters")
