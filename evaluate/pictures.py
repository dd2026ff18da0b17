"""Pictures and the page of a run, beside its numbers. What goes wrong with one costs no number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..train.runs import RunFolder
from .engine import Row
from .page import write_page
from .plots import make_plots

Say = Callable[[str], None]


def draw(rows: Sequence[Row], say: Say, *, together: bool = False) -> None:
    """Of every run that got a new result; or of all runs together, in one figure each."""
    wanted = [row for row in rows if row.subject.run and (together or row.status in ("done", "partly"))]
    runs = [RunFolder.at(home) for home in dict.fromkeys(row.subject.home for row in wanted)]
    if together and len(runs) > 1:
        folder = runs[0].path.parent / "compared" / "_".join(run.name for run in runs)
        _tried(lambda: _say_plots(make_plots(runs, folder), folder, say), str(folder), say)
        return
    for run in runs:
        draw_run(run, say)


def after_run(folder: Path, say: Say) -> None:
    """What training calls when a run has ended."""
    draw_run(RunFolder.at(folder), say)


def draw_run(run: RunFolder, say: Say) -> None:
    """Plots and page of one run: of its log, and of whatever evaluations it has."""
    folder = run.path / "plots"

    def both() -> None:
        _say_plots(make_plots([run], folder), folder, say)
        say(f"page: {write_page(run, folder)}")

    _tried(both, str(run.path), say)


def _say_plots(drawn: Sequence[Path], folder: Path, say: Say) -> None:
    if drawn:
        say(f"plots: {folder} ({', '.join(path.stem for path in drawn)})")


def _tried(job: Callable[[], None], place: str, say: Say) -> None:
    try:
        job()
    except Exception as error:  # noqa: BLE001  the numbers are safe on disk; a picture can be drawn again
        say(f"no plots for {place}: {type(error).__name__}: {error}")
