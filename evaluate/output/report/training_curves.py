"""What a page's own script draws: curves of all that was logged, which SAEs differ by seed, and how far a run is."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..figures.records import SEED, Record, thinned

DIGITS = 5
SHARED = ("sae", "step")


def training_data(records: Sequence[Record], course: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The data for the script; `course` is the progress of a run that has not ended."""
    first: dict[str, str] = {}  # the name of each group, by what its SAEs have in common
    saes = []
    for record in records:
        settings = {key: value for key, value in record.settings.items() if key != "seed"}
        common = json.dumps([record.run, record.variant, settings], sort_keys=True, default=str)
        group = first.setdefault(common, SEED.sub("", record.name) or record.name)
        saes.append({"name": record.name, "group": group, **_curves(record), **_worth(record)})
    names = list(first.values())
    for sae, record in zip(saes, records, strict=True):
        if names.count(sae["group"]) > 1:  # others have the same name, but other settings
            sae["group"] = record.name
    return {"saes": saes, "course": course}


def course_of(records: Sequence[Record], steps: int, pause: float) -> dict[str, Any]:
    """The progress of a run, and how often that is written."""
    ends = [record.log[-1] for record in records if record.log]
    last = max(ends, key=lambda line: line.get("step", 0), default={"step": -1})
    speed = {"tokens_per_second": _rounded(last.get("tokens_per_second")) or 0.0}
    step = last.get("step", 0) + 1
    return {"step": step, "steps": steps, **speed, "written": time.time(), "pause": pause}


def _curves(record: Record) -> dict[str, Any]:
    log = thinned(record.log)
    values = {name: [_rounded(line.get(name)) for line in log] for name in sorted(record.logged.difference(SHARED))}
    return {
        "steps": [line["step"] for line in log],
        "curves": {name: found for name, found in values.items() if any(value is not None for value in found)},
    }


def _worth(record: Record) -> dict[str, float | None]:
    """Held-out numbers or, while the run trains, those last logged."""
    return {
        name: _rounded(record.outcome.get(name, record.last(name) if record.steps is None else None))
        for name in ("l0", "explained_variance")
    }


def _rounded(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")
