"""Where a run's numbers come from: model, text and store, what was trained, when, and by which command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....cache_schema.sites import RESID
from ....train.run.run_folder import without_password
from ..figures.records import Record
from .markup import Html, element, joined


def origins(records: Sequence[Record]) -> Html:
    """A line for each run, which opens to the rest of it."""
    runs = dict.fromkeys(record.run for record in records)
    return joined([_origin(run, [one for one in records if one.run == run], len(runs) > 1) for run in runs])


def _origin(run: str, records: Sequence[Record], is_named: bool) -> Html:
    asked = records[0].asked
    cache, course, made = (_part(asked, name) for name in ("cache", "course", "provenance"))
    model = _together(cache.get("model"), cache.get("model_revision"))
    text = f"text {cache['corpus']}" if cache.get("corpus") else ""
    line = ", ".join(filter(None, [model, _sites(records), text, _length(asked, course)]))
    facts = {
        "store": _together(without_password(str(cache.get("url") or "")), cache.get("cache_id")),
        "trained": made.get("date"),
        "command": made.get("command"),
        "code": _code(made),
        "computed on": _part(made, "hardware").get("device"),
    }
    shown = {name: value for name, value in facts.items() if value}
    if not (line or shown):
        return Html("")
    rows = [part for name, value in shown.items() for part in (element("dt", name), element("dd", value))]
    summary = element("summary", ": ".join(filter(None, [run, line])) if is_named or not line else line)
    return element("details", summary, element("dl", *rows), class_="origin")


def _part(asked: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = asked.get(name)
    return found if isinstance(found, Mapping) else {}


def _sites(records: Sequence[Record]) -> str:
    """Where the SAEs read, if it is the same for all."""
    found = {(str(one.settings.get("layer")), str(one.settings.get("hook", RESID))) for one in records}
    layer, hook = next(iter(found))
    return f"layer {layer} ({hook})" if len(found) == 1 and layer != "None" else ""


def _length(asked: Mapping[str, Any], course: Mapping[str, Any]) -> str:
    tokens, steps = course.get("tokens"), asked.get("total_steps")
    return f"{tokens:,} tokens in {steps:,} steps" if isinstance(tokens, int) and isinstance(steps, int) else ""


def _code(made: Mapping[str, Any]) -> str:
    packages, git = _part(made, "packages"), _part(made, "git")
    version = f"saemill {packages['saemill']}" if packages.get("saemill") else ""
    commit = f"{str(git['commit'])[:9]}{', changed' if git.get('is_dirty') else ''}" if git.get("commit") else None
    torch = f"torch {packages['torch']}" if packages.get("torch") else ""
    return ", ".join(filter(None, [_together(version, commit), torch]))


def _together(name: Any, more: Any) -> str:
    """`name (more)`"""
    return f"{name} ({more})" if name and more else str(name or "")
