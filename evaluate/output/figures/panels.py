"""Panels that look the same in every plot: lines over training, and bars by SAE.

A `Lines` or `Bars` knows which SAEs have its numbers; a panel without any is not drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .records import Record
from .seeds import groups_of, places_of
from .style import INK, Look, caption, is_wide, log_axis, look, new_figure

STEP = "training step"
LEGEND_LINES, LINE_HEIGHT = 2, 0.17  # lines of a legend that fit into a figure, and inches for each more
FEWEST_OF_CURVE = 10  # points: with fewer, each has a mark
Looks = Mapping[str, Look]


class Panel(Protocol):
    """Something that can be drawn from some records."""

    def finds(self, records: Sequence[Record]) -> bool: ...

    def draw(self, axis: Axes, records: Sequence[Record], looks: Looks) -> None: ...


@dataclass(frozen=True)
class Lines:
    """A number over training, one line per SAE."""

    title: str
    y: str
    values: Callable[[Record], tuple[list[float], list[float]]]
    limits: tuple[float, float] | None = None  # for a share; None: the axis fits its values

    def finds(self, records: Sequence[Record]) -> bool:
        return any(self.values(record)[1] for record in records)

    def draw(self, axis: Axes, records: Sequence[Record], looks: Looks) -> None:
        drawn: list[float] = []
        for record in records:
            steps, values = self.values(record)
            if values:
                axis.plot(steps, values, **looks[record.name].strokes, marker=mark_of(values))
                drawn += values
        if self.limits is not None:
            axis.set_ylim(*self.limits)
        elif is_wide(drawn):
            log_axis(axis, "y")
        caption(axis, self.title, STEP, self.y)


def mark_of(values: Sequence[float]) -> str | None:
    """A mark for each point if they are few: the line between them would pass for a measured curve, or be none."""
    return "o" if len(values) < FEWEST_OF_CURVE else None


@dataclass(frozen=True)
class Bars:
    """One number per SAE as a horizontal bar, labelled with the number; every SAE has its row in every panel.

    Numbers that span orders of magnitude are dots: a bar's length means nothing on a logarithmic axis.
    """

    title: str
    x: str
    value: Callable[[Record], float | None]
    format: str = "{:.3g}"
    may_be_log: bool = False
    floor: float | None = None  # anything lower is drawn there, labelled with the true number

    def finds(self, records: Sequence[Record]) -> bool:
        return any(self.value(record) is not None for record in records)

    def draw(self, axis: Axes, records: Sequence[Record], looks: Looks) -> None:
        found = {row: value for row, record in enumerate(records) if (value := self.value(record)) is not None}
        drawn = {row: value if self.floor is None else max(value, self.floor) for row, value in found.items()}
        styles = [looks[records[row].name] for row in drawn]
        is_log = self.may_be_log and is_wide(list(drawn.values()))
        (_draw_dots if is_log else _draw_bars)(axis, drawn, styles)
        start = min(drawn.values()) if is_log else 0.0
        for row in range(len(records)):
            text = self.format.format(found[row]) if row in found else "\N{EN DASH}"
            at = max(drawn.get(row, start), start)
            axis.annotate(
                text, (at, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8, color=INK
            )
        axis.set_yticks(range(len(records)), [record.name for record in records], fontsize=8, parse_math=False)
        axis.set_ylim(len(records) - 0.5, -0.5)
        axis.grid(visible=False, axis="y")
        caption(axis, self.title, self.x, "")


def _draw_bars(axis: Axes, values: Mapping[int, float], styles: Sequence[Look]) -> None:
    colours, hatches = [style.colour for style in styles], [style.hatch for style in styles]
    axis.barh(list(values), list(values.values()), color=colours, hatch=hatches, edgecolor="white", height=0.7)
    axis.axvline(0, color=INK, lw=0.8)
    axis.margins(x=0.22)
    axis.xaxis.set_major_locator(MaxNLocator(4))


def _draw_dots(axis: Axes, values: Mapping[int, float], styles: Sequence[Look]) -> None:
    for (row, value), style in zip(values.items(), styles, strict=True):
        axis.plot([value], [row], style.mark, color=style.colour, ms=8)
    log_axis(axis, "x")
    axis.margins(x=0.3)


def series_of(names: str | tuple[str, ...], factor: float = 1.0) -> Callable[[Record], tuple[list[float], list[float]]]:
    """A logged number, or the first of several that an SAE has logged, times `factor`."""
    candidates = (names,) if isinstance(names, str) else names

    def values(record: Record) -> tuple[list[float], list[float]]:
        steps, found = next((record.series(name) for name in candidates if name in record.logged), ([], []))
        return steps, [factor * value for value in found]

    return values


def draw_panels(
    panels: Sequence[Panel], records: Sequence[Record], title: str, among: Sequence[Record] = ()
) -> Figure | None:
    """All panels that any SAE has numbers for, and one legend for all; None if there is nothing to draw. A single bar
    is left out: its number is in the table. If these are only some of the SAEs, `among` are all of them."""
    drawn = [panel for panel in panels if panel.finds(records) and (len(records) > 1 or not isinstance(panel, Bars))]
    if not drawn:
        return None
    among = among or records
    looks = looks_of(among)
    has_bars = any(isinstance(panel, Bars) for panel in drawn)
    tall = 1.2 + 0.24 * len(records) if has_bars else 0.0
    figure, axes = new_figure(len(drawn), columns=2 if len(drawn) in (2, 4) else 3, height=max(3.1, tall))
    for panel, axis in zip(drawn, axes, strict=True):
        panel.draw(axis, records, looks)
    figure.suptitle(title, fontsize=12, color=INK, parse_math=False)
    if not all(isinstance(panel, Bars) for panel in drawn):
        add_legend(figure, *legend_of(records, among, any(isinstance(panel, Lines) for panel in drawn)))
    return figure


def legend_of(records: Sequence[Record], among: Sequence[Record], has_lines: bool) -> tuple[list[Line2D], list[str]]:
    """Handles and names of these among all SAEs, one for all seeds of an SAE: lines or, without any, marks."""
    groups, looks = groups_of(among), looks_of(among)
    shown = {groups[record.name]: looks[record.name] for record in records}
    seeds = Counter(groups[record.name] for record in records)
    handles = [Line2D([], [], color=one.colour, ls=one.line, lw=2) for one in shown.values()]
    if not has_lines:
        handles = [Line2D([], [], color=one.colour, ls="", marker=one.mark, ms=8) for one in shown.values()]
    return handles, [f"{name} ({seeds[name]} seeds)" if seeds[name] > 1 else name for name in shown]


def add_legend(figure: Figure, handles: Sequence[Line2D], names: Sequence[str]) -> None:
    """One legend for the whole figure, below it."""
    columns = max(1, min(len(names), int(figure.get_figwidth() * 9 / max(len(name) + 4 for name in names))))
    further = max(0, -(-len(names) // columns) - LEGEND_LINES)  # thirty SAEs would leave no height for the panels
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * further)
    legend = figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def looks_of(records: Sequence[Record]) -> dict[str, Look]:
    """The look of each SAE, the same for all its seeds: by its place among all, whichever of them a panel shows."""
    return {name: look(place) for name, place in places_of(records).items()}
