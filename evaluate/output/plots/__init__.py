"""The plot registry: every file in this folder is a plot, and the image has its name.

A file has `draw(records) -> Figure | None`, where None means that no SAE has the data; a file with several plots has
`PLOTS`, such functions by image name. No global state of matplotlib is touched: figures are objects that are drawn to
files and dropped.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ....train.disk.atomic_files import replace_file
from ....train.file_registry import file_names
from ..figures.records import Record

KINDS: dict[str, dict[str, None]] = {"png": {}, "svg": {"Date": None}}  # formats, with metadata
Draw = Callable[[Sequence[Record]], Figure | None]


def all_plots() -> dict[str, Draw]:
    """All plots by name, sorted."""
    found: dict[str, Draw] = {}
    for name in file_names(__name__):
        file = import_module(f"{__name__}.{name}")
        found |= getattr(file, "PLOTS", None) or {name: file.draw}
    return dict(sorted(found.items()))


def make_plots(records: Sequence[Record], out: Path) -> list[Path]:
    """Draw every plot that these SAEs have the data for, as PNG, and as SVG for papers; several runs share each figure.

    Returns the PNG files.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in all_plots().items():
        figure = draw(records)
        path = out / f"{name}.png"
        if figure is None:
            for kind in KINDS:
                path.with_suffix(f".{kind}").unlink(missing_ok=True)  # an earlier plot, whose data are gone
            continue
        save(figure, path)
        written.append(path)
    return written


def save(figure: Figure, path: Path) -> None:
    """Draw to one file for each format, atomically, as others may draw the same plot."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # one layout pass is not enough with square panels and a shared colour bar
    for kind, metadata in KINDS.items():
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, metadata=metadata)
        figure.set_layout_engine("none")  # it has been laid out
        replace_file(path.with_suffix(f".{kind}"), drawn.getvalue())
