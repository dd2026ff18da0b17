"""The summary: what an SAE keeps of the residual and the model's predictions, against how many latents it uses."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...context.write_and_read_results import INTERVALS, differing, interval_of
from ..figures.panels import Looks, draw_panels
from ..figures.records import CORE, Record
from ..figures.style import caption, is_wide, log_axis

FLOOR = -0.5  # a lower score is drawn here, pointing down, with its number


@dataclass(frozen=True)
class Points:
    """A score against L0, a point per SAE, with the score's interval if it was measured."""

    title: str
    y: str
    name: str

    def found(self, records: Sequence[Record]) -> list[tuple[Record, float, float]]:
        return [(r, x, y) for r in records if (x := r.held_out("l0")) and (y := r.held_out(self.name)) is not None]

    def finds(self, records: Sequence[Record]) -> bool:
        return len(self.found(records)) > 1  # a single point says next to nothing

    def interval(self, record: Record) -> tuple[float, float] | None:
        document = record.documents.get("core")
        return None if document is None else interval_of(document, INTERVALS, CORE[self.name])

    def draw(self, axis: Axes, records: Sequence[Record], looks: Looks) -> None:
        found = self.found(records)
        for record, x, y in found:
            style = looks[record.name]
            if ends := self.interval(record):
                low, high = (max(end, FLOOR) for end in ends)
                axis.plot([x, x], [low, high], "_-", color=style.colour, lw=1.2, ms=7)
            is_off = y < FLOOR
            axis.plot(
                [x], [max(y, FLOOR)], "v" if is_off else style.mark, color=style.colour, ms=9, mec="white", mew=0.8
            )
            if is_off:
                axis.annotate(
                    f"{y:.3g}", (x, FLOOR), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8
                )
        if is_wide([x for _, x, _ in found]):
            log_axis(axis, "x")
        axis.margins(0.18)
        caption(axis, self.title, "L0 (active latents per token)", self.y)


PANELS = (
    Points("Residual", "explained variance", "explained_variance"),
    Points("Loss of the model", "CE score (1 clean, 0 ablated)", "ce_score"),
    Points("Predictions of the model", "KL score (1 clean, 0 ablated)", "kl_score"),
)


def draw(records: Sequence[Record]) -> Figure | None:
    """Only SAEs that core measured, if there are any: training's own numbers are from another split."""
    measured = [replace(record, outcome={}) for record in records if "core" in record.documents]
    lines = ["Quality against sparsity"]
    if any(panel.interval(record) for panel in PANELS for record in measured):
        lines.append("95 % intervals over documents")
    if uneven := differing(record.documents["core"] for record in measured):
        warning = f"these numbers do not compare: core's results differ in {uneven}"
        lines += textwrap.wrap(warning, 50)  # characters that fit the width of a panel
    return draw_panels(PANELS, measured or records, "\n".join(lines), records)
