"""Plots of a run with several seeds, as PNG and SVG.

`RUN_measures`: a panel for each measure, a row for each SAE: its seeds as points, and the 95 % interval of their mean
as a band. The base's interval runs through all rows, so that whatever lies outside it shows at a glance. The axis spans
the SAEs that are compared: a sanity baseline outside it is an arrow with its mean.
`RUN_training`: explained variance over training: the mean of an SAE's seeds, in a band from the lowest to the highest.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..evaluate.output.figures.panels import STEP, add_legend
from ..evaluate.output.figures.style import INK, Look, caption, look, new_figure
from ..evaluate.output.plots import KINDS, save
from .compare_and_decide import Families, half_width, is_baseline, values_of

SMOOTHED = 40  # points of a curve at most, each the mean of several batches
Curves = Mapping[str, Sequence[Sequence[tuple[float, float]]]]
"""Steps and values over training by SAE, a list for each seed."""


def draw_bands(
    run: str, title: str, values: Families, base: str, curves: Curves, out: Path, more_is_better: Collection[str] = ()
) -> list[Path]:
    """Draw both plots, as far as there are numbers for them; `more_is_better` names measures."""
    out.mkdir(parents=True, exist_ok=True)
    looks = {label: look(place) for place, label in enumerate(values)}
    measures = draw_measures(title, values, base, looks, more_is_better)
    figures = {"measures": measures, "training": draw_training(title, curves, looks)}
    written = []
    for name, figure in figures.items():
        paths = [out / f"{run}_{name}.{kind}" for kind in KINDS]
        for path in paths:
            path.unlink(missing_ok=True)  # an earlier plot, of which there may be no numbers now
        if figure is not None:
            save(figure, paths[0])
            written += paths
    return written


def draw_measures(
    title: str, values: Families, base: str, looks: Mapping[str, Look], more_is_better: Collection[str] = ()
) -> Figure | None:
    """A panel for each measure, except one that a single SAE has, such as growth, or that is the same for all to four
    digits, such as L0 on a top-k base."""
    columns = list(dict.fromkeys(name for seeds in values.values() for one in seeds.values() for name in one))
    shown = {}
    for name in columns:
        found = {label: values_of(seeds, name) for label, seeds in values.items()}
        rounded = {f"{number:.4g}" for numbers in found.values() for number in numbers}
        if len(rounded) > 1 and sum(map(bool, found.values())) > 1:
            shown[name] = found
    if not shown:
        return None
    figure, axes = new_figure(len(shown), height=max(2.4, 1.0 + 0.26 * len(values)))
    for axis, (name, found) in zip(axes, shown.items(), strict=True):
        if len(found.get(base, ())) > 1:
            axis.axvspan(*_interval(found[base]), color=looks[base].colour, alpha=0.15, lw=0)
        _set_limits(axis, found)
        for row, (label, own) in enumerate(found.items()):
            _draw_row(axis, row, own, looks[label])
        axis.set_yticks(range(len(found)), list(found), fontsize=8, parse_math=False)
        axis.set_ylim(len(found) - 0.5, -0.5)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        better = "\nmore is better" if name in more_is_better else ""
        words = name.replace(".", " ").replace("_", " ")
        caption(axis, words, f"seeds, and the 95 % interval of their mean{better}", "")
    figure.suptitle(title, fontsize=12, color=INK, parse_math=False)
    return figure


def draw_training(title: str, curves: Curves, looks: Mapping[str, Look]) -> Figure | None:
    figure, (axis,) = new_figure(1, width=8.8, height=4.2)
    for label, seeds in curves.items():
        drawn = [points for points in seeds if points]
        if not drawn:
            continue
        shortest = min(map(len, drawn))  # beyond its end the mean would be over fewer seeds
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
    add_legend(figure, axis.lines, [str(line.get_label()) for line in axis.lines])
    return figure


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `SMOOTHED` points, each the mean of as many consecutive ones as needed."""
    size = -(-len(points) // SMOOTHED)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(statistics.fmean(step for step, _ in part), statistics.fmean(v for _, v in part)) for part in parts]


def _set_limits(axis: Axes, found: Mapping[str, Sequence[float]]) -> None:
    """Span the compared SAEs and their intervals or, if only baselines have the measure, those of the baselines."""
    compared = [own for label, own in found.items() if own and not is_baseline(label)] or filter(None, found.values())
    ends = [end for own in compared for end in (min(own), max(own), *_interval(own))]
    low, high = min(ends), max(ends)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 0.06
    axis.set_xlim(low - room, high + room)


def _interval(own: Sequence[float]) -> tuple[float, float]:
    middle, half = statistics.fmean(own), half_width(own) if len(own) > 1 else 0.0
    return middle - half, middle + half


def _draw_row(axis: Axes, row: int, own: Sequence[float], style: Look) -> None:
    low, high = axis.get_xlim()
    if own and not low <= (middle := statistics.fmean(own)) <= high:
        is_left = middle < low
        text = f"\N{LEFTWARDS ARROW} {middle:.3g}" if is_left else f"{middle:.3g} \N{RIGHTWARDS ARROW}"
        side, inward = ("left", 4) if is_left else ("right", -4)
        offset = {"xytext": (inward, 0), "textcoords": "offset points", "ha": side, "va": "center"}
        at_edge = low if is_left else high
        axis.annotate(text, (at_edge, row), **offset, fontsize=8, color=style.colour)
        return
    if len(own) > 1:
        axis.plot(_interval(own), [row, row], color=style.colour, lw=6, alpha=0.35)
        axis.plot([statistics.fmean(own)], [row], "|", color=style.colour, ms=14, mew=2)
    axis.plot(own, [row] * len(own), style.mark, color=style.colour, ms=4, mec="white", mew=0.4)
