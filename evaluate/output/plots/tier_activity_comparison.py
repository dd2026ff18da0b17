"""How active each tier is in the end: on test text where that was measured, else in the last logged batch."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..figures.panels import draw_parts
from ..figures.records import Record
from ..figures.style import INK, caption, new_figure, shades

MOST = 8  # tiers of an SAE


def activity(record: Record, tier: int) -> float | None:
    """Mean share of a tier's latents that are active on a token."""
    measured = record.metric("tiers", f"tier_activity.active_share_{tier}")
    return measured if measured is not None else record.last(f"tiers/activity_{tier}")


def draw(records: Sequence[Record]) -> Figure | None:
    shown = [record for record in records if activity(record, 1) is not None]
    if not shown:
        return None
    tiers = [tier for tier in range(1, MOST + 1) if any(activity(record, tier) is not None for record in shown)]
    parts = {f"tier {tier}": [activity(record, tier) for record in shown] for tier in tiers}
    figure, (axis,) = new_figure(1, width=max(5.0, 1.0 + 0.9 * len(shown)), height=3.6)
    draw_parts(axis, [record.name for record in shown], parts, shades(len(parts)), unit=100)
    figure.suptitle("Activity of tiers", fontsize=12, color=INK)
    caption(axis, "", "", "% of the tier's latents active on a token")
    return figure
