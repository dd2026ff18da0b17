"""Pictures of what has been evaluated, beside the results. What goes wrong with one costs no number."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import plots
from .engine import Row
from .results import read_result


def draw(rows: Sequence[Row], say: Callable[[str], None]) -> None:
    """Of every run that got a new result, all plots that its results have something for."""
    for home in dict.fromkeys(row.subject.home for row in rows if row.status in ("done", "partly")):
        folder = home / "evals" / "plots"
        documents = [read_result(path) for path in sorted((home / "evals").glob("*/*_eval_results.json"))]
        try:
            drawn = plots.draw_all(documents, folder)
        except Exception as error:  # noqa: BLE001  the numbers are safe on disk; a picture can be drawn again
            say(f"no plots for {home}: {type(error).__name__}: {error}")
            continue
        if drawn:
            say(f"plots: {folder} ({', '.join(path.name for path in drawn)})")
