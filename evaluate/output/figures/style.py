"""One look for all plots: colours that colour-blind readers can tell apart, and text that is only text.

An SAE has one colour in every panel, shared by all its seeds; from the eighth on, colours repeat with another line
style, mark and hatching. Tiers and layers are ordered, so they have shades of one scale, which no SAE has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito's palette without its yellow, which is too light for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
LINES, MARKS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
HATCHES = ("", "////", "....", "xxxx")
INK, FAINT = "#333333", "#DDDDDD"
THICKEST, THINNEST = 3.4, 1.2
WIDTH, HEIGHT, DPI = 4.4, 3.1, 120  # inches of a panel
UNKNOWN = "\N{MIDDLE DOT}"
SHOWN = {"\n": "\N{DOWNWARDS ARROW WITH TIP LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW}", " ": "\N{OPEN BOX}"}


@dataclass(frozen=True)
class Look:
    colour: str
    line: str
    mark: str
    hatch: str
    width: float

    @property
    def strokes(self) -> dict[str, Any]:
        return {"color": self.colour, "linestyle": self.line, "linewidth": self.width}


def look(place: int) -> Look:
    """The look of the SAE at this place among all. Later lines are thinner, so that those below show at their sides."""
    width = THICKEST - (THICKEST - THINNEST) * min(place, len(COLOURS)) / len(COLOURS)
    again = place // len(COLOURS) % len(LINES)
    return Look(COLOURS[place % len(COLOURS)], LINES[again], MARKS[again], HATCHES[again], width)


def shades(count: int) -> list[str]:
    """Colours for a few ordered things, such as tiers or layers, from dark to light."""
    scale = colormaps["cividis"]
    places = [0.0] if count == 1 else [0.02 + 0.8 * i / (count - 1) for i in range(count)]
    return ["#{:02X}{:02X}{:02X}".format(*(round(255 * part) for part in scale(place)[:3])) for place in places]


def new_figure(
    panels: int, columns: int = 3, width: float = WIDTH, height: float = HEIGHT, wide: int = 0
) -> tuple[Figure, list[Axes]]:
    """A figure with this many panels, `columns` in a row; the first `wide` have a row each."""
    columns = columns if wide else min(columns, panels)
    rows = wide + -(-(panels - wide) // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.5), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    places = [grid[row, :] for row in range(wide)]
    places += [grid[wide + place // columns, place % columns] for place in range(panels - wide)]
    axes = [figure.add_subplot(place) for place in places]
    for axis in axes:  # no box, a faint grid behind, and at every tick the full number, without a common offset
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(_in_full)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(INK)
        axis.tick_params(colors=INK, labelsize=8)
        axis.set_axisbelow(True)
        axis.grid(color=FAINT, linewidth=0.6)
    return figure, axes


def _in_full(value: float, _: object) -> str:
    return f"{value:.10g}".replace("-", "\N{MINUS SIGN}")


def caption(axis: Axes, title: str, x: str, y: str) -> None:
    """Title and axis labels; names from runs are never read as formulas."""
    axis.set_title(title, fontsize=10, color=INK, parse_math=False)
    axis.set_xlabel(x, fontsize=9, color=INK, parse_math=False)
    axis.set_ylabel(y, fontsize=9, color=INK, parse_math=False)


def first_of(title: str, drawn: int, found: int, what: str = "SAEs") -> str:
    """The title, with a note if not all are drawn."""
    return title if drawn == found else f"{title} (first {drawn} of {found} {what})"


def log_axis(axis: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers."""
    side = axis.xaxis if which == "x" else axis.yaxis
    axis.set(**{f"{which}scale": "log"})
    side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    side.set_major_formatter(_in_full)
    side.set_minor_formatter(NullFormatter())


def shown(token: str) -> str:
    """A token as a label: whitespace made visible, a middle dot for characters that the font lacks."""
    known = get_font(findfont(FontProperties())).get_charmap()
    inner = token[1:] if len(token) > 1 and token[0] == " " else token  # most tokens begin with a space
    marked = (SHOWN.get(letter, letter) for letter in inner)
    return "".join(letter if ord(letter) in known else UNKNOWN for letter in marked) or UNKNOWN


def is_wide(values: Sequence[float]) -> bool:
    """Whether positive values span so much that only a logarithmic axis shows them all."""
    positive = [value for value in values if value > 0]
    return bool(positive) and len(positive) == len(values) and max(positive) > 20 * min(positive)
