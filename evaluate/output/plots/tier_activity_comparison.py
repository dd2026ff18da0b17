"""How active each tier is at the end: for SAEs that were measured on the test split, if there are any; otherwise for
all, in the last logged batch."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..figures.panels import draw_parts
from ..figures.records import Record
from ..figures.style import INK, caption, new_figure, shades

MOST = 8  # tiers of an SAE


def measured(record: Record, tier: int) -> float | None:
    """Mean share of a tier's latents that are active on a token."""
    return record.metric("tiers", f"tier_activity.active_share_{tier}")


def logged(record: Record, tier: int) -> float | None:
    """The same, as training last logged it."""
    return record.last(f"tiers/activity_{tier}")


def draw(records: Sequence[Record]) -> Figure | None:
    is_measured = any(measured(record, 1) is not None for record in records)
    activity = measured if is_measured else logged
    shown = [record for record in records if activity(record, 1) is not None]
    if not shown:
        return None
    tiers = [tier for tier in range(1, MOST + 1) if any(activity(record, tier) is not None for record in shown)]
    parts = {f"tier {tier}": [activity(record, tier) for record in shown] for tier in tiers}
    figure, (axis,) = new_figure(1, width=max(5.0, 1.0 + 0.9 * len(shown)), height=3.6)
    draw_parts(axis, [record.name for record in shown], parts, shades(len(parts)), unit=100)
    figure.suptitle("Activity of tiers", fontsize=12, color=INK)
    text = "test split" if is_measured else "last logged batch"
    caption(axis, "", "", f"% of the tier's latents active on a token\n({text})")
    return figure
