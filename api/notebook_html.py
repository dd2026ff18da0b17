"""Tables for notebooks. Names of models, corpora and runs are other people's text and reach the page as text only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

MISSING = "-"


def table(
    rows: Sequence[Mapping[str, Any]],
    caption: str = "",
    notes: Iterable[str] = (),
    heading: Callable[[str], str] = str,
) -> str:
    """Rows of named values; a column is there if any row has it, its whole name under the pointer."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f'<th title="{escape(column)}">{escape(heading(column))}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(_cell(row.get(column)) for column in columns)}</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


def facts(values: Mapping[str, Any], caption: str = "") -> str:
    """One thing, a line for each of its properties."""
    lines = "".join(f'<tr><th style="text-align:left">{escape(k)}</th>{_cell(v)}</tr>' for k, v in values.items())
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<tbody>{lines}</tbody></table>"


def say(value: Any) -> str:
    """A value in words."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _cell(value: Any) -> str:
    return f'<td style="text-align:left">{escape(say(value))}</td>'
