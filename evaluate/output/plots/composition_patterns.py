"""What latents are made of: a row per latent, with its parts by descending weight and number; a panel per SAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures.panels import draw_each
from ..figures.records import Record
from ..figures.style import INK, caption

MOST = 4  # SAEs in one figure
LATENTS = 16  # of each
WIDTH, HEIGHT = 7.5, 4.4


def patterns_of(record: Record) -> list[dict[str, Any]]:
    """Latents and their parts, the best explained first."""
    found = record.unstructured("tiers").get("compositions") or []
    return sorted((dict(one) for one in found if one.get("parts")), key=lambda one: -one["r_squared"])[:LATENTS]


def draw(records: Sequence[Record]) -> Figure | None:
    seen = [record for record in records if patterns_of(record)][:MOST]
    return draw_each(seen, draw_patterns, "What latents are composed of", width=WIDTH, height=HEIGHT)


def draw_patterns(axis: Axes, record: Record) -> None:
    """Dark where a part is heavy."""
    patterns = patterns_of(record)
    most = max(len(one["parts"]) for one in patterns)
    weights = [[part["weight"] for part in one["parts"]] + [0.0] * (most - len(one["parts"])) for one in patterns]
    axis.imshow(weights, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    middle = max(max(row) for row in weights) / 2
    for row, one in enumerate(patterns):
        for column, part in enumerate(one["parts"]):
            colour = "white" if part["weight"] > middle else INK
            axis.text(column, row, str(part["latent"]), ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(most), [str(rank + 1) for rank in range(most)], fontsize=7)
    names = [f"{one['latent']} (tier {one['tier']}, R² {one['r_squared']:.2f})" for one in patterns]
    axis.set_yticks(range(len(patterns)), names, fontsize=7)
    axis.grid(visible=False)
    caption(axis, record.name, "part of the tier below, by weight", "latent")
