"""The strongest latents on the first tokens of a test window; a panel per SAE."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures.panels import draw_each
from ..figures.records import Record
from ..figures.style import INK, caption, shown

MOST = 6  # SAEs in one figure: more would be too small to read
WIDTH, HEIGHT = 9.5, 4.4


def pattern_of(record: Record) -> dict[str, list]:
    return dict(record.unstructured("browser").get("pattern") or {})


def draw(records: Sequence[Record]) -> Figure | None:
    seen = [record for record in records if pattern_of(record).get("latents")][:MOST]
    return draw_each(seen, draw_pattern, "Activation patterns", width=WIDTH, height=HEIGHT)


def draw_pattern(axis: Axes, record: Record) -> None:
    """Latents down, tokens across, dark where active."""
    pattern = pattern_of(record)
    image = axis.imshow(pattern["activations"], aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    tokens, latents = [shown(token) for token in pattern["tokens"]], pattern["latents"]
    axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7, parse_math=False)
    axis.set_yticks(range(len(latents)), [str(latent) for latent in latents], fontsize=7)
    axis.grid(visible=False)
    caption(axis, record.name, "token", "latent")
    bar = axis.figure.colorbar(image, ax=axis, pad=0.01, fraction=0.03)
    bar.set_label("activation", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)
