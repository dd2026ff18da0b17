"""Plots of a run of several seeds, as PNG and SVG: a seed is a point, and a band is what seeds leave uncertain.

`RUN_measures`: a panel for each measure, a row for each SAE: its seeds, and the 95 % interval of their mean. The
interval of the base runs through all rows, so that whatever lies outside it shows at a glance.
`RUN_training`: explained variance over training, the mean of an SAE's seeds in the band from its least to its most.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..evaluate.output.figures.panels import STEP
from ..evaluate.output.figures.style import INK, Look, caption, look, new_figure
from ..evaluate.output.plots import KINDS, save
from .compare_and_decide import Families, half_width, values_of

SMOOTHED = 40  # points of a curve at most: each is the mean of the batches that it stands for
Curves = Mapping[str, Sequence[Sequence[tuple[float, float]]]]
"""Steps and values over training by SAE, a list for each seed."""


def draw_bands(run: str, title: str, values: Families, base: str, curves: Curves, out: Path) -> list[Path]:
    """Draw both plots, as far as there are numbers for them."""
    out.mkdir(parents=True, exist_ok=True)
    looks = {label: look(place) for place, label in enumerate(values)}
    figures = {"measures": draw_measures(title, values, base, looks), "training": draw_training(title, curves, looks)}
    written = []
    for name, figure in figures.items():
        paths = [out / f"{run}_{name}.{kind}" for kind in KINDS]
        for path in paths:
            path.unlink(missing_ok=True)  # a plot of what is no longer there
        if figure is not None:
            save(figure, paths[0])
            written += paths
    return written


def draw_measures(title: str, values: Families, base: str, looks: Mapping[str, Look]) -> Figure | None:
    """A measure that is the same for all SAEs to four digits, such as L0 on a top-k base, has no panel."""
    columns = list(dict.fromkeys(name for seeds in values.values() for one in seeds.values() for name in one))
    numbers = {name: {label: values_of(seeds, name) for label, seeds in values.items()} for name in columns}
    told = {name: {f"{n:.4g}" for some in found.values() for n in some} for name, found in numbers.items()}
    shown = {name: found for name, found in numbers.items() if len(told[name]) > 1}
    if not shown:
        return None
    figure, axes = new_figure(len(shown), height=max(2.4, 1.0 + 0.26 * len(values)))
    for axis, (name, found) in zip(axes, shown.items(), strict=True):
        if len(found.get(base, ())) > 1:
            middle, half = statistics.fmean(found[base]), half_width(found[base])
            axis.axvspan(middle - half, middle + half, color=looks[base].colour, alpha=0.15, lw=0)
        for row, (label, own) in enumerate(found.items()):
            _draw_row(axis, row, own, looks[label])
        axis.set_yticks(range(len(found)), list(found), fontsize=8, parse_math=False)
        axis.set_ylim(len(found) - 0.5, -0.5)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        caption(axis, name, "seeds, and the 95 % interval of their mean", "")
    figure.suptitle(title, fontsize=12, color=INK, parse_math=False)
    return figure


def draw_training(title: str, curves: Curves, looks: Mapping[str, Look]) -> Figure | None:
    figure, (axis,) = new_figure(1, width=8.8, height=4.2)
    for label, seeds in curves.items():
        drawn = [points for points in seeds if points]
        if not drawn:
            continue
        shortest = min(map(len, drawn))  # where a seed ends, the mean would be that of the others
        smooth = [smoothed(points[:shortest]) for points in drawn]
        steps = [step for step, _ in smooth[0]]
        at_step = list(zip(*([value for _, value in points] for points in smooth), strict=True))
        style = looks[label]
        axis.fill_between(
            steps, [min(v) for v in at_step], [max(v) for v in at_step], color=style.colour, alpha=0.3, lw=0
        )
        middle = [statistics.fmean(v) for v in at_step]
        axis.plot(steps, middle, color=style.colour, linestyle=style.line, linewidth=1.0, label=label)
    if not axis.lines:
        return None
    caption(axis, f"{title}: mean over seeds, from the least to the most", STEP, "explained variance of a batch")
    for text in axis.legend(fontsize=8, frameon=False, loc="lower right").get_texts():
        text.set_parse_math(False)
    return figure


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `SMOOTHED` points, each the mean of its neighbours'."""
    size = -(-len(points) // SMOOTHED)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(statistics.fmean(step for step, _ in part), statistics.fmean(v for _, v in part)) for part in parts]


def _draw_row(axis: Axes, row: int, own: Sequence[float], style: Look) -> None:
    if len(own) > 1:
        middle, half = statistics.fmean(own), half_width(own)
        axis.plot([middle - half, middle + half], [row, row], color=style.colour, lw=6, alpha=0.35)
        axis.plot([middle], [row], "|", color=style.colour, ms=14, mew=2)
    axis.plot(own, [row] * len(own), style.mark, color=style.colour, ms=4, mec="white", mew=0.4)
