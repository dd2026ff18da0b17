"""How far training came: steps, the loss in the end, and how masks took hold on the way."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..figures.panels import Bars, Lines, draw_panels, series_of
from ..figures.records import Record

PANELS = (
    Bars("Training steps completed", "steps", lambda r: None if r.steps is None else float(r.steps), "{:,.0f}"),
    Bars("Final training loss", "weighted sum of all terms", lambda r: r.last("loss"), may_be_log=True),
    Lines("Mask coefficient", "0 no mask, 1 full mask", series_of("mask/coefficient"), (-0.03, 1.03)),
    Lines("Specialisation retention", "% of activation inside its range", series_of("mask/retention", 100), (0, 103)),
    Lines("Adapter gate", "mean gate", series_of("adapter/gate")),
)


def draw(records: Sequence[Record]) -> Figure | None:
    trained = [record for record in records if record.log or record.steps is not None]
    return draw_panels(PANELS, trained, "Progress of training")
