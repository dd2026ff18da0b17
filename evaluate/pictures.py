"""Pictures of what has been evaluated, beside the results. What goes wrong with one costs no number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..train.runs import RunFolder
from .engine import Row

Say = Callable[[str], None]


def draw(rows: Sequence[Row], compares: bool, say: Say) -> None:
    """Plots and the page of every run with a new result; where runs are compared, plots of all of them together."""
    fresh = dict.fromkeys(row.subject.home for row in rows if row.status in ("done", "partly"))
    for home in fresh:
        _draw([home], home / "plots", say)
    homes = list(dict.fromkeys(row.subject.home for row in rows if row.path.is_file()))
    if compares and len(homes) > 1:
        _draw(homes, homes[0].parent / "compare" / "+".join(home.name for home in homes), say)


def after_run(folder: Path, say: Say) -> None:
    """What training calls when a run has ended."""
    _draw([folder], folder / "plots", say)


def _draw(homes: Sequence[Path], folder: Path, say: Say) -> None:
    from .page import write_page  # loads matplotlib, which nobody waits for who asks for no pictures
    from .plots import make_plots

    runs = [RunFolder.at(home) for home in homes]
    try:
        drawn = make_plots(runs, folder)
        page = write_page(runs[0], folder) if len(runs) == 1 else None
    except Exception as error:  # noqa: BLE001  the numbers are safe on disk; a picture can be drawn again
        say(f"no plots in {folder}: {type(error).__name__}: {error}")
        return
    if drawn:
        say(f"plots: {folder} ({', '.join(path.stem for path in drawn)})")
    if page is not None:
        say(f"page: {page}")
