"""Draw plots of results next to them. A plot that fails does not cost any number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ...train.run.run_folder import RunFolder
from ..context.write_and_read_results import Row
from ..evals.browser.overview import refresh
from .figures.records import Documents, Say, read_records
from .report.page_of_a_run import write_live_page, write_page

LONGEST_NAME = 255  # bytes, of a file system


def draw(rows: Sequence[Row], compares: bool, say: Say) -> None:
    """Plots and the page of every run; if runs are compared, of those with a new result, and of all together."""
    rows = [row for row in rows if row.subject.home.is_dir()]  # a folder that has been removed is not made again
    known = {row.path.absolute(): row.document for row in rows if row.document is not None}
    new = [row for row in rows if row.document is not None and not (compares and row.status == "kept")]
    for home in dict.fromkeys(row.subject.home for row in new):
        _draw([home], home / "plots", say, known)
    homes = list(dict.fromkeys(row.subject.home for row in rows if row.document is not None))
    if compares and len(homes) > 1:
        _draw(homes, homes[0].parent / "compare" / joint_name([home.name for home in homes]), say, known, True)


def joint_name(names: Sequence[str]) -> str:
    """All names joined; if that is too long for a folder, its beginning and a digest of the whole."""
    whole = "+".join(names).encode()
    if len(whole) <= LONGEST_NAME:
        return whole.decode()
    digest = f"-{hashlib.sha256(whole).hexdigest()[:12]}"
    return whole[: LONGEST_NAME - len(digest)].decode(errors="ignore") + digest


def after_run(folder: Path, say: Say, pause: float = 0.0) -> None:
    """Called by training when a run has finished and, every `pause` seconds, while it trains."""
    run = RunFolder(folder)
    if run.is_finished:
        _draw([folder], folder / "plots", say)
        return
    try:
        write_live_page(run, read_records([run], say), pause)
    except Exception as error:  # noqa: BLE001  a page must not stop the training
        say(f"no page of {run.path} while it trains: {type(error).__name__}: {error}")


def _draw(
    homes: Sequence[Path], folder: Path, say: Say, known: Documents | None = None, only_known: bool = False
) -> None:
    from .plots import make_plots  # late: without plots, nothing should wait for matplotlib

    try:
        records = read_records([RunFolder(home) for home in homes], say, known, only_known)
        drawn = make_plots(records, folder)
        page = write_page(homes[0] if len(homes) == 1 else folder, records, folder)
        if len(homes) == 1:
            refresh(homes[0], records)
    except Exception as error:  # noqa: BLE001  the numbers are on disk; a plot can be drawn again
        say(f"no plots in {folder}: {type(error).__name__}: {error}")
        return
    if drawn:
        say(f"plots: {folder} ({', '.join(path.stem for path in drawn)})")
    say(f"page: {page}")
